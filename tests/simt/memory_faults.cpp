// Faults in what memory is used how, and by which block.
#include <cstdint>
#include <type_traits>

#include "cases.h"
#include "faults.h"

namespace peft_kernels::cuda {
namespace {

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

// The copy may read its source at any time until the wait.
template <bool kBroken>
void copy_source_changed(const Pointers& p) {
  auto* s = shared_memory<float>();
  const int i = 4 * thread_index();
  copy_async_16(s + i, p.out + i);  // fault: copy_source_changed
  copy_async_commit();
  if (!kBroken) copy_async_wait<0>();
  store(p.out + i, 1.0f);
  copy_async_wait<0>();
}

template <bool kBroken>
void copy_to_global(const Pointers& p) {
  auto* s = shared_memory<float>();
  const int i = 4 * thread_index();
  copy_async_16(kBroken ? p.out + i : s + i, p.in + i);  // fault: copy_to_global
}

template <bool kBroken>
void copy_from_shared(const Pointers& p) {
  auto* s = shared_memory<float>();
  const int i = 4 * thread_index();
  copy_async_16(s + i, kBroken ? s + i : p.in + i);  // fault: copy_from_shared
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
void constant_in_shared(const Pointers& p) {
  auto* s = shared_memory<float>();
  store(s + thread_index(), 1.0f);
  store(p.out + thread_index(),
        load_constant((kBroken ? s : p.in) + thread_index()));  // fault: constant_in_shared
}

template <bool kBroken>
void atomic_in_shared(const Pointers& p) {
  auto* s = shared_memory<uint32_t>();
  if (thread_index() == 0) store(s, 0u);
  sync_threads();
  atomic_add_ordered(kBroken ? s : p.counter, 1);  // fault: atomic_in_shared
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

// The same, of what one warp of each block wrote. Ballots and shuffles order its lanes in time alone.
enum class Fault { kNone, kBefore, kAfter, kLate };
template <Fault kFault>
void sum_of_warps(const Pointers& p) {
  const int i = thread_index(), blocks = grid_size();
  if (kFault != Fault::kLate) store(p.out + kCount * block_index() + i, 1.0f);
  kFault == Fault::kBefore ? static_cast<void>(ballot(true)) : sync_threads();
  uint32_t ticket = 0;
  if (i == 0) ticket = atomic_add_ordered(p.counter, 1);
  ticket = shuffle(ticket, 0);
  if (kFault == Fault::kLate) store(p.out + kCount * block_index() + i, 1.0f);
  if (kFault != Fault::kAfter) sync_threads();
  if (i >= kWarp || ticket != static_cast<uint32_t>(blocks - 1)) return;
  float sum = 0;
  for (int block = 0; block < blocks; ++block) sum += load(p.out + kCount * block + i);
  store(p.out + kCount * blocks + i, sum);
}
template <bool kBroken>
void ticket_after_ballot(const Pointers& p) {
  sum_of_warps<kBroken ? Fault::kBefore : Fault::kNone>(p);
}
template <bool kBroken>
void ticket_by_shuffle(const Pointers& p) {
  sum_of_warps<kBroken ? Fault::kAfter : Fault::kNone>(p);
}
template <bool kBroken>
void ticket_before_store(const Pointers& p) {
  sum_of_warps<kBroken ? Fault::kLate : Fault::kNone>(p);
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

// Workspace used again while another block may still read it.
template <bool kBroken>
void overwritten_by_another_block(const Pointers& p) {
  const int i = thread_index();
  store(p.out + kCount * block_index() + i, 1.0f);
  if (block_index() == 0) {
    const float value = load(p.out + 2 * kCount + i);
    kBroken ? static_cast<void>(ballot(value == 0)) : sync_threads();
    if (i == 0) atomic_add_ordered(p.counter, 1);
  } else {
    while (i == 0 && atomic_add_ordered(p.counter, 0) == 0) {
    }
    sync_threads();
    store(p.out + 2 * kCount + i, 1.0f);  // fault: overwritten_by_another_block
  }
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

// Two blocks in step. A plain load need never see what another block writes.
template <bool kBroken>
void wait_by_load(const Pointers& p) {
  if (thread_index() != 0) return;
  for (uint32_t step = 1; step < 20; ++step) {
    atomic_add_ordered(p.counter, 1);
    uint32_t count = 0;
    while (count < 2 * step) {
      count = kBroken ? load(p.counter) : atomic_add_ordered(p.counter, 0);  // fault: wait_by_load
    }
  }
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

}  // namespace

const Cases& memory_faults() {
  static const Cases cases = {
      FAULT(copy_read_early, 1),
      FAULT(copy_of_last_group, 1, 32 * kCount),
      FAULT(copy_of_another, 1, 16 * kCount),
      FAULT(copy_source_changed, 1, 16 * kCount),
      FAULT(copy_to_global, 1, 16 * kCount),
      FAULT(copy_from_shared, 1, 16 * kCount),
      FAULT(copy_over_read, 1),
      FAULT(unaligned_load, 1),
      FAULT(out_of_bounds, 1),
      FAULT(below_bounds, 1),
      FAULT(more_than_launched, 1),
      FAULT(plain_pointer, 1),
      FAULT(constant_in_shared, 1),
      FAULT(atomic_in_shared, 1),
      FAULT(null_pointer, 1),
      FAULT(wild_pointer, 1),
      FAULT(global_out_of_bounds, 1),
      FAULT(ticket_too_early, 5),
      FAULT(ticket_after_ballot, 5),
      FAULT(ticket_by_shuffle, 5),
      FAULT(ticket_before_store, 5),
      FAULT(read_of_another_block, 2),
      FAULT(overwritten_by_another_block, 2),
      FAULT(written_by_two_blocks, 2),
      FAULT(constant_that_changes, 1),
      FAULT(wait_for_all_blocks, 9),
      FAULT(wait_by_load, 2),
      FAULT(lock, 5),
  };
  return cases;
}

}  // namespace peft_kernels::cuda
