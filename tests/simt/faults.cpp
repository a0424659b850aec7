// Kernels with a planted fault, and the same kernels without it, for test_emulator.py: each in both forms by
// `if constexpr (kBroken)`. A comment "fault: NAME" marks the line that the report must name.
#include <cstdint>
#include <type_traits>
#include <vector>

#include "cases.h"
#include "launch.cuh"

namespace peft_kernels::cuda {
namespace {

constexpr int kCount = 64;  // threads of a block

struct Pointers {
  const float* in = nullptr;
  float* out = nullptr;
  uint32_t* counter = nullptr;
};

// A kernel of 64 threads around a function of Pointers.
template <void (*kBody)(const Pointers&)>
struct Kernel {
  static constexpr int kThreads = kCount, kBlocksPerSm = 1;
  using Params = Pointers;
  static DEVICE void run(const Params& p) { kBody(p); }
};

template <void (*kBody)(const Pointers&)>
void run_blocks(int blocks, int shared_bytes = 4 * kCount) {
  std::vector<float> in(4096, 1.0f), out(4096);
  uint32_t counter = 0;
  launch<Kernel<kBody>>({in.data(), out.data(), &counter}, blocks, nullptr, shared_bytes);
}

template <bool kBroken>
void barrier_missing(const Pointers& p) {
  auto* s = shared_memory<float>();
  const int i = thread_index();
  store(s + i, 1.0f);
  if (!kBroken) sync_threads();
  store(p.out + i, load(s + (i + 32) % kCount));  // fault: barrier_missing
}

template <bool kBroken>
void overwritten_too_early(const Pointers& p) {
  auto* s = shared_memory<float>();
  const int i = thread_index();
  float sum = 0;
  for (int step = 0; step < 2; ++step) {
    store(s + i, 1.0f);  // fault: overwritten_too_early
    sync_threads();
    sum += load(s + (i + 32) % kCount);
    if (!kBroken) sync_threads();
  }
  store(p.out + i, sum);
}

template <bool kBroken>
void written_twice(const Pointers&) {
  auto* s = shared_memory<float>();
  const int i = thread_index();
  store(s + (kBroken ? i / 2 : i), 1.0f);  // fault: written_twice
}

template <bool kBroken>
void warp_barrier_missing(const Pointers& p) {
  auto* s = shared_memory<float>();
  const int i = thread_index();
  store(s + i, 1.0f);
  if (!kBroken) sync_warp();
  store(p.out + i, load(s + (i ^ 1)));  // fault: warp_barrier_missing
}

// What one warp's barrier does not order: other warps.
template <bool kBroken>
void warp_barrier_for_block(const Pointers& p) {
  auto* s = shared_memory<float>();
  const int i = thread_index();
  store(s + i, 1.0f);
  sync_warp();
  if (!kBroken) sync_threads();
  store(p.out + i, load(s + (i ^ 32)));  // fault: warp_barrier_for_block
}

// Bytes of one word are apart, as far as races go.
template <bool kBroken>
void neighbouring_bytes(const Pointers&) {
  auto* s = shared_memory<uint8_t>();
  const int i = thread_index();
  store(s + (kBroken && i == 41 ? 40 : i), static_cast<uint8_t>(i));  // fault: neighbouring_bytes
}

template <bool kBroken>
void lane_skips_shuffle(const Pointers& p) {
  float value = static_cast<float>(thread_index());
  if (!kBroken || lane_index() != 5) value += shuffle_xor(value, 1);  // fault: lane_skips_shuffle
  store(p.out + thread_index(), value);
}

template <bool kBroken>
void lanes_in_two_shuffles(const Pointers& p) {
  float value = static_cast<float>(thread_index());
  if (kBroken && lane_index() < 7) {
    value += shuffle(value, 0);
  } else {
    value += shuffle(value, 0);
  }
  store(p.out + thread_index(), value);
}

template <bool kBroken>
void barrier_or_shuffle(const Pointers& p) {
  float value = 1.0f;
  if (kBroken && lane_index() == 9) {
    sync_threads();
  } else {
    value = shuffle(value, 3);
  }
  if (!kBroken) sync_threads();
  store(p.out + thread_index(), value);
}

template <bool kBroken>
void barrier_skipped(const Pointers& p) {
  if (!kBroken || thread_index() < 40) sync_threads();  // fault: barrier_skipped
  store(p.out + thread_index(), 1.0f);
}

template <bool kBroken>
void two_barriers(const Pointers& p) {
  if (kBroken && thread_index() < 32) {
    sync_threads();
  } else {
    sync_threads();
  }
  store(p.out + thread_index(), 1.0f);
}

template <bool kBroken>
void copy_read_early(const Pointers& p) {
  auto* s = shared_memory<float>();
  const int i = thread_index();
  if (i < kCount / 4) copy_async_16(s + 4 * i, p.in + 4 * i);
  copy_async_commit();
  if (!kBroken) copy_async_wait<0>();
  sync_threads();
  store(p.out + i, load(s + i));  // fault: copy_read_early
}

// A wait lets the last group be under way, a copy that no group holds is not waited for at all.
template <bool kBroken>
void copy_of_last_group(const Pointers& p) {
  auto* s = shared_memory<float>();
  const int i = thread_index();
  copy_async_16(s + 8 * i, p.in + 4 * i);
  copy_async_commit();
  copy_async_16(s + 8 * i + 4, p.in + 4 * i);
  if (!kBroken) copy_async_commit();
  copy_async_wait<kBroken ? 0 : 1>();
  store(p.out + i, load(s + 8 * i));
  copy_async_wait<0>();
  store(p.out + i, load(s + 8 * i + 4));  // fault: copy_of_last_group
}

// The wait is for a thread's own copies.
template <bool kBroken>
void copy_of_another(const Pointers& p) {
  auto* s = shared_memory<float>();
  const int i = thread_index();
  copy_async_16(s + 4 * i, p.in + 4 * i);
  copy_async_commit();
  copy_async_wait<0>();
  if (!kBroken) sync_threads();
  store(p.out + i, load(s + 4 * ((i + 32) % kCount)));
}

template <bool kBroken>
void copy_over_read(const Pointers& p) {
  auto* s = shared_memory<float>();
  const int i = thread_index();
  store(s + i, 1.0f);
  sync_threads();
  store(p.out + i, load(s + i));
  if (!kBroken) sync_threads();
  if (i < kCount / 4) copy_async_16(s + 4 * i, p.in + 4 * i);
  copy_async_commit();
  copy_async_wait<0>();
}

template <bool kBroken>
void unaligned_load(const Pointers& p) {
  const auto* at = p.in + (kBroken ? 1 : 0);
  const auto value = load_once(reinterpret_cast<const Words4*>(at));  // fault: unaligned_load
  store(p.out + thread_index(), bit_cast<float>(value.v[0]));
}

template <bool kBroken>
void unaligned_row(const Pointers& p) {
  auto* s = shared_memory<char>();
  uint32_t r[4];
  store(reinterpret_cast<Words4*>(s) + thread_index() % 32 + 32 * warp_index(), Words4{});
  sync_threads();
  load_matrix_x4(r, s + 16 * lane_index() + (kBroken ? 8 : 0));  // fault: unaligned_row
  store(p.out + thread_index(), bit_cast<float>(r[0]));
}

template <bool kBroken>
void row_in_global_memory(const Pointers& p) {
  auto* s = shared_memory<Words4>();
  uint32_t r[4];
  store(s + thread_index(), Words4{});
  sync_threads();
  const void* row = kBroken ? static_cast<const void*>(p.in) : s;
  load_matrix_x4(r, row);  // fault: row_in_global_memory
  store(p.out + thread_index(), bit_cast<float>(r[0]));
}

template <bool kBroken>
void out_of_bounds(const Pointers&) {
  auto* s = shared_memory<float>();
  store(s + thread_index() + (kBroken ? 1 : 0), 1.0f);  // fault: out_of_bounds
}

template <bool kBroken>
void below_bounds(const Pointers& p) {
  auto* s = shared_memory<float>();
  store(s + thread_index(), 1.0f);
  sync_threads();
  const uint32_t address = shared_address(s) + 4 * static_cast<uint32_t>(thread_index());
  store(p.out + thread_index(),
        bit_cast<float>(load_shared(address - (kBroken ? 4 : 0))));  // fault: below_bounds
}

struct Big {
  float v[2 * kCount];
};
template <bool kBroken>
void more_than_launched(const Pointers&) {
  using Mine = std::conditional_t<kBroken, Big, float>;
  auto* s = reinterpret_cast<float*>(shared_memory<Mine>());  // fault: more_than_launched
  store(s + thread_index(), 1.0f);
}

template <bool kBroken>
void plain_pointer(const Pointers&) {
  auto* s = shared_memory<float>();
  if (kBroken) {
    *reinterpret_cast<volatile float*>(s) = 1.0f;
  } else {
    store(s + thread_index(), 1.0f);
  }
}

template <bool kBroken>
void null_pointer(const Pointers& p) {
  store(kBroken && thread_index() == 12 ? nullptr : p.out + thread_index(), 1.0f);  // fault: null_pointer
}

template <bool kBroken>
void wild_pointer(const Pointers& p) {
  const auto* at = kBroken ? reinterpret_cast<const float*>(uintptr_t{1} << 44) : p.in;
  store(p.out + thread_index(), load(at));  // fault: wild_pointer
}

// Only AddressSanitizer knows.
template <bool kBroken>
void global_out_of_bounds(const Pointers& p) {
  store(p.out + (kBroken ? 4096 : 0) + thread_index(), 1.0f);
}

// ---- Between blocks --------------------------------------------------------------------------------------

// The last of the blocks to arrive adds up what all have written.
template <bool kBroken>
void ticket_too_early(const Pointers& p) {
  const int i = thread_index(), blocks = grid_size();
  auto* s = shared_memory<uint32_t>();
  store(p.out + kCount * block_index() + i, 1.0f);
  if (!kBroken) sync_threads();
  if (i == 0) store(s, atomic_add_ordered(p.counter, 1));
  sync_threads();
  if (load(s) != static_cast<uint32_t>(blocks - 1)) return;
  float sum = 0;
  for (int block = 0; block < blocks; ++block) {
    sum += load(p.out + kCount * block + i);  // fault: ticket_too_early
  }
  store(p.out + kCount * blocks + i, sum);
}

// A shuffle tells other lanes the ticket, but not what it is a ticket for.
template <bool kBroken>
void ticket_by_shuffle(const Pointers& p) {
  const int i = thread_index(), blocks = grid_size();
  if (i >= kWarp) return;
  store(p.out + kCount * block_index() + i, 1.0f);
  sync_warp();
  uint32_t ticket = 0;
  if (i == 0) ticket = atomic_add_ordered(p.counter, 1);
  ticket = shuffle(ticket, 0);
  if (!kBroken) sync_warp();
  if (ticket != static_cast<uint32_t>(blocks - 1)) return;
  float sum = 0;
  for (int block = 0; block < blocks; ++block) {
    sum += load(p.out + kCount * block + i);  // fault: ticket_by_shuffle
  }
  store(p.out + kCount * blocks + i, sum);
}

// Without an atomic between, a block knows nothing of another.
template <bool kBroken>
void read_of_another_block(const Pointers& p) {
  const int i = thread_index();
  store(p.out + kCount * block_index() + i, 1.0f);
  if (!kBroken) return;
  sync_threads();
  const int other = kCount * (1 - block_index()) + i;
  store(p.out + 2 * kCount + kCount * block_index() + i, load(p.out + other));
}

template <bool kBroken>
void written_by_two_blocks(const Pointers& p) {
  store(p.out + thread_index() + (kBroken ? 1 : kCount) * block_index(), 1.0f);
}

template <bool kBroken>
void constant_that_changes(const Pointers& p) {
  const int i = thread_index();
  store(p.out + i, 1.0f);
  if (!kBroken) return;
  store(p.out + kCount + i, load_constant(p.out + i));
}

// All blocks wait for all: more than are resident at a time.
template <bool kBroken>
void wait_for_all_blocks(const Pointers& p) {
  if (thread_index() == 0) {
    atomic_add_ordered(p.counter, 1);
    while (kBroken && atomic_add_ordered(p.counter, 0) < static_cast<uint32_t>(grid_size())) {
    }
  }
  sync_threads();
}

// As long as a lane holds the lock, nobody of its warp gets it.
template <bool kBroken>
void lock(const Pointers& p) {
  if (!kBroken && thread_index() != 0) return;
  while (atomic_add_ordered(p.counter, 1) != 0) atomic_add_ordered(p.counter, ~0u);
  if (kBroken) ballot(true);
  store(p.out, load(p.out) + 1.0f);
  atomic_add_ordered(p.counter, ~0u);
}

#define CASE(name, ...)                                             \
  {#name "-broken", [] { run_blocks<name<true>>(__VA_ARGS__); }}, { \
    #name "-fixed", [] { run_blocks<name<false>>(__VA_ARGS__); }    \
  }

}  // namespace

const Cases& fault_cases() {
  static const Cases cases = {
      CASE(barrier_missing, 1),
      CASE(overwritten_too_early, 1),
      CASE(written_twice, 1),
      CASE(warp_barrier_missing, 1),
      CASE(warp_barrier_for_block, 1),
      CASE(neighbouring_bytes, 1),
      CASE(lane_skips_shuffle, 1),
      CASE(lanes_in_two_shuffles, 1),
      CASE(barrier_or_shuffle, 1),
      CASE(barrier_skipped, 1),
      CASE(two_barriers, 1),
      CASE(copy_read_early, 1),
      CASE(copy_of_last_group, 1, 32 * kCount),
      CASE(copy_of_another, 1, 16 * kCount),
      CASE(copy_over_read, 1),
      CASE(unaligned_load, 1),
      CASE(unaligned_row, 1, 16 * kCount),
      CASE(row_in_global_memory, 1, 16 * kCount),
      CASE(out_of_bounds, 1),
      CASE(below_bounds, 1),
      CASE(more_than_launched, 1),
      CASE(plain_pointer, 1),
      CASE(null_pointer, 1),
      CASE(wild_pointer, 1),
      CASE(global_out_of_bounds, 1),
      CASE(ticket_too_early, 5),
      CASE(ticket_by_shuffle, 5),
      CASE(read_of_another_block, 2),
      CASE(written_by_two_blocks, 2),
      CASE(constant_that_changes, 1),
      CASE(wait_for_all_blocks, 9),
      CASE(lock, 5),
  };
  return cases;
}

}  // namespace peft_kernels::cuda
