// Faults in how threads of a block work together.
#include <cstdint>

#include "cases.h"
#include "faults.h"

namespace peft_kernels::cuda {
namespace {

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

// A shuffle orders lanes in time, but memory is not told.
template <bool kBroken>
void overwritten_after_shuffle(const Pointers& p) {
  auto* s = shared_memory<float>();
  const int i = thread_index();
  store(s + i, 1.0f);
  sync_threads();
  float value = load(s + (i ^ 1));
  value = shuffle(value, 0);
  if (!kBroken) sync_threads();
  store(s + i, value);  // fault: overwritten_after_shuffle
  store(p.out + i, value);
}

// That the writer itself was the last to read does not matter.
template <bool kBroken>
void read_by_the_warp(const Pointers& p) {
  auto* s = shared_memory<float>();
  float value = 0;
  if (thread_index() < kWarp) value = load(s);
  value = shuffle(value, 0);
  if (!kBroken) sync_threads();
  if (thread_index() == 7) {
    value += load(s);
    store(s, value);  // fault: read_by_the_warp
  }
  store(p.out + thread_index(), value);
}
template <bool kBroken>
void read_by_two_warps(const Pointers& p) {
  auto* s = shared_memory<float>();
  float value = load(s);
  ballot(true);
  if (thread_index() == kWarp) atomic_add_ordered(p.counter, 1);
  if (!kBroken) sync_threads();
  if (thread_index() == 0) {
    while (atomic_add_ordered(p.counter, 0) == 0) {
    }
    value += load(s);
    store(s, value);  // fault: read_by_two_warps
  }
  store(p.out + thread_index(), value);
}

template <bool kBroken>
void written_twice(const Pointers&) {
  auto* s = shared_memory<float>();
  const int i = thread_index();
  store(s + (kBroken ? i / 2 : i), 1.0f);  // fault: written_twice
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
  if (!kBroken || lane_index() % 2 == 0) value += shuffle_xor(value, 1);  // fault: lane_skips_shuffle
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
  if (kBroken && lane_index() % 2 == 0) {
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

}  // namespace

const Cases& thread_faults() {
  static const Cases cases = {
      FAULT(barrier_missing, 1),    FAULT(overwritten_too_early, 1), FAULT(overwritten_after_shuffle, 1),
      FAULT(read_by_the_warp, 1),   FAULT(read_by_two_warps, 1),     FAULT(written_twice, 1),
      FAULT(neighbouring_bytes, 1), FAULT(lane_skips_shuffle, 1),    FAULT(lanes_in_two_shuffles, 1),
      FAULT(barrier_or_shuffle, 1), FAULT(barrier_skipped, 1),       FAULT(two_barriers, 1),
  };
  return cases;
}

}  // namespace peft_kernels::cuda
