// Faults in the communication between blocks.
#include <cstdint>

#include "core/device.cuh"
#include "faults.cuh"

namespace cases {
namespace {

using cases::kWarp;
using cases::shared_memory;
using peft_kernels::cuda::atomic_add_ordered;

// The last block to arrive adds up what all blocks wrote.
template <bool kBroken>
__global__ void ticket_too_early(Pointers p) {
  const int i = threadIdx.x, blocks = gridDim.x;
  auto* s = shared_memory<uint32_t>();
  p.out[kCount * blockIdx.x + i] = 1.0f;
  if (!kBroken) __syncthreads();
  if (i == 0) *s = atomic_add_ordered(p.counter, 1);
  __syncthreads();
  if (*s != static_cast<uint32_t>(blocks - 1)) return;
  float sum = 0;
  for (int block = 0; block < blocks; ++block) {
    sum += p.out[kCount * block + i];  // fault: ticket_too_early
  }
  p.out[kCount * blocks + i] = sum;
}

// The same with one warp per block. Ballots and shuffles order its lanes in time, but not their memory
// accesses.
enum class Fault { kNone, kBefore, kAfter, kLate };
template <Fault kFault>
__device__ void sum_of_warps(const Pointers& p) {
  const int i = threadIdx.x, blocks = gridDim.x;
  if (kFault != Fault::kLate) p.out[kCount * blockIdx.x + i] = 1.0f;
  kFault == Fault::kBefore ? static_cast<void>(__ballot_sync(kAll, true)) : __syncthreads();
  uint32_t ticket = 0;
  if (i == 0) ticket = atomic_add_ordered(p.counter, 1);
  ticket = __shfl_sync(kAll, ticket, 0);
  if (kFault == Fault::kLate) p.out[kCount * blockIdx.x + i] = 1.0f;
  if (kFault != Fault::kAfter) __syncthreads();
  if (i >= kWarp || ticket != static_cast<uint32_t>(blocks - 1)) return;
  float sum = 0;
  for (int block = 0; block < blocks; ++block) sum += p.out[kCount * block + i];
  p.out[kCount * blocks + i] = sum;
}
template <bool kBroken>
__global__ void ticket_after_ballot(Pointers p) {
  sum_of_warps<kBroken ? Fault::kBefore : Fault::kNone>(p);
}
template <bool kBroken>
__global__ void ticket_by_shuffle(Pointers p) {
  sum_of_warps<kBroken ? Fault::kAfter : Fault::kNone>(p);
}
template <bool kBroken>
__global__ void ticket_before_store(Pointers p) {
  sum_of_warps<kBroken ? Fault::kLate : Fault::kNone>(p);
}

// A relaxed atomic counts, but orders nothing.
template <bool kBroken>
__global__ void relaxed_ticket(Pointers p) {
  const int i = threadIdx.x, blocks = gridDim.x;
  auto* s = shared_memory<uint32_t>();
  p.out[kCount * blockIdx.x + i] = 1.0f;
  __syncthreads();
  if (i == 0) *s = kBroken ? atomicAdd(p.counter, 1) : atomic_add_ordered(p.counter, 1);
  __syncthreads();
  if (*s != static_cast<uint32_t>(blocks - 1)) return;
  float sum = 0;
  for (int block = 0; block < blocks; ++block) {
    sum += p.out[kCount * block + i];  // fault: relaxed_ticket
  }
  p.out[kCount * blocks + i] = sum;
}

// Without an atomic in between, nothing orders accesses of two blocks.
template <bool kBroken>
__global__ void read_of_another_block(Pointers p) {
  const int i = threadIdx.x;
  p.out[kCount * blockIdx.x + i] = 1.0f;
  if (!kBroken) return;
  __syncthreads();
  const int other = kCount * (1 - blockIdx.x) + i;
  p.out[2 * kCount + kCount * blockIdx.x + i] = p.out[other];
}

// Workspace reused while another block may still read it.
template <bool kBroken>
__global__ void overwritten_by_another_block(Pointers p) {
  const int i = threadIdx.x;
  p.out[kCount * blockIdx.x + i] = 1.0f;
  if (blockIdx.x == 0) {
    const float value = p.out[2 * kCount + i];
    kBroken ? static_cast<void>(__ballot_sync(kAll, value == 0)) : __syncthreads();
    if (i == 0) atomic_add_ordered(p.counter, 1);
    p.out[3 * kCount + i] = value;
  } else {
    while (i == 0 && atomic_add_ordered(p.counter, 0) == 0) {
    }
    __syncthreads();
    p.out[2 * kCount + i] = 1.0f;  // fault: overwritten_by_another_block
  }
}

template <bool kBroken>
__global__ void written_by_two_blocks(Pointers p) {
  p.out[threadIdx.x + (kBroken ? 1 : kCount) * blockIdx.x] = 1.0f;
}

// All blocks wait for each other: more than are resident at once.
template <bool kBroken>
__global__ void wait_for_all_blocks(Pointers p) {
  if (threadIdx.x == 0) {
    atomic_add_ordered(p.counter, 1);
    while (kBroken && atomic_add_ordered(p.counter, 0) < gridDim.x) {
    }
  }
  __syncthreads();
}

// Two blocks alternate. A plain load need never see what another block writes.
template <bool kBroken>
__global__ void wait_by_load(Pointers p) {
  if (threadIdx.x != 0) return;
  for (uint32_t step = 1; step < 20; ++step) {
    atomic_add_ordered(p.counter, 1);
    uint32_t count = 0;
    while (count < 2 * step) {
      // Volatile, so that the compiler does not hoist it out of the loop.
      if (kBroken)
        asm volatile("ld.global.u32 %0, [%1];" : "=r"(count) : "l"(p.counter));  // fault: wait_by_load
      if (!kBroken) count = atomic_add_ordered(p.counter, 0);
    }
  }
}

// While a lane holds the lock, no other lane of its warp can get it.
template <bool kBroken>
__global__ void lock(Pointers p) {
  if (!kBroken && threadIdx.x != 0) return;
  while (atomic_add_ordered(p.counter, 1) != 0) atomic_add_ordered(p.counter, ~0u);
  if (kBroken) __ballot_sync(kAll, true);
  *p.out = *p.out + 1.0f;
  atomic_add_ordered(p.counter, ~0u);
}

}  // namespace

const Cases& block_faults() {
  static const Cases cases = {
      FAULT(ticket_too_early, 5),
      FAULT(ticket_after_ballot, 5),
      FAULT(ticket_by_shuffle, 5),
      FAULT(ticket_before_store, 5),
      FAULT(relaxed_ticket, 5),
      FAULT(read_of_another_block, 2),
      FAULT(overwritten_by_another_block, 2),
      FAULT(written_by_two_blocks, 2),
      FAULT(wait_for_all_blocks, 9),
      FAULT(wait_by_load, 2),
      FAULT(lock, 5),
  };
  return cases;
}

}  // namespace cases
