// Faults in the synchronisation of a block's threads.
#include "faults.cuh"

namespace cases {
namespace {

template <bool kBroken>
__global__ void barrier_missing(Pointers p) {
  auto* s = shared_memory<float>();
  const int i = threadIdx.x;
  s[i] = 0.0f;
  __syncthreads();
  s[i] = p.in[i];
  if (!kBroken) __syncthreads();
  p.out[i] = s[(i + 32) % kCount];  // fault: barrier_missing
}

template <bool kBroken>
__global__ void overwritten_too_early(Pointers p) {
  auto* s = shared_memory<float>();
  const int i = threadIdx.x;
  float sum = 0;
#pragma unroll 1
  for (int step = 0; step < 2; ++step) {
    s[i] = p.in[step];  // fault: overwritten_too_early
    __syncthreads();
    sum += s[(i + 32) % kCount];
    if (!kBroken) __syncthreads();
  }
  p.out[i] = sum;
}

// A shuffle orders lanes in time, but not their memory accesses.
template <bool kBroken>
__global__ void overwritten_after_shuffle(Pointers p) {
  auto* s = shared_memory<float>();
  const int i = threadIdx.x;
  s[i] = 1.0f;
  __syncthreads();
  float value = s[i ^ 1];
  value = __shfl_sync(kAll, value, 0);
  if (!kBroken) __syncthreads();
  s[i] = value;  // fault: overwritten_after_shuffle
  p.out[i] = value;
}

// It does not help that the writer itself was the last reader.
template <bool kBroken>
__global__ void read_by_the_warp(Pointers p) {
  volatile auto* s = shared_memory<float>();
  const int i = threadIdx.x;
  s[i] = 1.0f;
  __syncthreads();
  float value = 0;
  if (i < kWarp) value = s[0];
  value = __shfl_sync(kAll, value, 0);
  if (!kBroken) __syncthreads();
  if (i == 7) {
    value += s[0];
    s[0] = value;  // fault: read_by_the_warp
  }
  p.out[i] = value;
}
template <bool kBroken>
__global__ void read_by_two_warps(Pointers p) {
  volatile auto* s = shared_memory<float>();
  const int i = threadIdx.x;
  s[i] = 1.0f;
  __syncthreads();
  float value = s[0];
  __ballot_sync(kAll, true);
  if (i == kWarp) atomicAdd(p.counter, 1);
  if (!kBroken) __syncthreads();
  if (i == 0) {
    while (atomicAdd(p.counter, 0) == 0) {
    }
    value += s[0];
    s[0] = value;  // fault: read_by_two_warps
  }
  p.out[i] = value;
}

template <bool kBroken>
__global__ void written_twice(Pointers) {
  volatile auto* s = shared_memory<float>();
  const int i = threadIdx.x;
  s[kBroken ? i / 2 : i] = 1.0f;  // fault: written_twice
}

// Bytes of one word are tracked separately.
template <bool kBroken>
__global__ void neighbouring_bytes(Pointers) {
  volatile auto* s = shared_memory<uint8_t>();
  const int i = threadIdx.x;
  s[kBroken && i == 41 ? 40 : i] = static_cast<uint8_t>(i);  // fault: neighbouring_bytes
}

template <bool kBroken>
__global__ void lane_skips_shuffle(Pointers p) {
  const int i = threadIdx.x;
  float value = p.in[i];
  if (!kBroken || i % 2 == 0) value += __shfl_xor_sync(kAll, value, 1);  // fault: lane_skips_shuffle
  p.out[i] = value;
}

// Two kinds of shuffles: the compiler merges identical ones.
template <bool kBroken>
__global__ void lanes_in_two_shuffles(Pointers p) {
  const int i = threadIdx.x;
  float value = p.in[i];
  if (kBroken && i % kWarp < 7) {
    value += __shfl_xor_sync(kAll, value, 1);
  } else {
    value += __shfl_sync(kAll, value, 0);
  }
  p.out[i] = value;
}

template <bool kBroken>
__global__ void barrier_or_shuffle(Pointers p) {
  const int i = threadIdx.x;
  float value = p.in[i];
  if (kBroken && i % 2 == 0) {
    __syncthreads();
  } else {
    value = __shfl_sync(kAll, value, 3);
  }
  if (!kBroken) __syncthreads();
  p.out[i] = value;
}

template <bool kBroken>
__global__ void barrier_skipped(Pointers p) {
  if (!kBroken || threadIdx.x < 40) __syncthreads();  // fault: barrier_skipped
  p.out[threadIdx.x] = 1.0f;
}

// One warp waits at one barrier, the other warp at the other.
template <bool kBroken>
__global__ void two_barriers(Pointers p) {
  const int i = threadIdx.x;
  if (kBroken && i < kWarp) {
    asm volatile("barrier.sync 1;" ::: "memory");
  } else {
    asm volatile("barrier.sync 0;" ::: "memory");
  }
  p.out[i] = 1.0f;
}

// Only the lanes in the mask have to arrive, but all of these.
template <bool kBroken>
__global__ void mask_without_the_lane(Pointers p) {
  const int i = threadIdx.x;
  float value = p.in[i];
  const unsigned mask = kBroken ? 0xffffu : kAll;
  value += __shfl_sync(mask, value, i % 16);  // fault: mask_without_the_lane
  p.out[i] = value;
}

}  // namespace

const Cases& thread_faults() {
  static const Cases cases = {
      FAULT(barrier_missing, 1),       FAULT(overwritten_too_early, 1), FAULT(overwritten_after_shuffle, 1),
      FAULT(read_by_the_warp, 1),      FAULT(read_by_two_warps, 1),     FAULT(written_twice, 1),
      FAULT(neighbouring_bytes, 1),    FAULT(lane_skips_shuffle, 1),    FAULT(lanes_in_two_shuffles, 1),
      FAULT(barrier_or_shuffle, 1),    FAULT(barrier_skipped, 1),       FAULT(two_barriers, 1),
      FAULT(mask_without_the_lane, 1),
  };
  return cases;
}

}  // namespace cases
