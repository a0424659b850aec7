// Vector clocks of a block whose threads are ordered by more than barriers of the whole block.
//
// A clock has an entry for each actor: a thread, or a unit that copies or multiplies on its own. Accesses of
// the actor before that tick are ordered before those of the clock's owner. A second entry says up to which
// tick fence.proxy.async has made a thread's writes visible to the units.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "../text/instruction.h"

namespace ptx {

// Actors other than threads, as SharedShadow::Cell has them. Copies have one for each mbarrier that they
// complete on, so that waiting for one barrier does not order what another one covers.
struct Units {
  static constexpr uint16_t kFirst = 0x1000;
  static constexpr uint16_t kBarriers = 32, kWarpgroups = 8, kCount = 2 * kBarriers + kWarpgroups;

  static constexpr uint16_t bulk_copy(int barrier) { return static_cast<uint16_t>(kFirst + barrier); }
  static constexpr uint16_t copy(int barrier) { return static_cast<uint16_t>(kFirst + kBarriers + barrier); }
  static constexpr uint16_t warpgroup(int index) {
    return static_cast<uint16_t>(kFirst + 2 * kBarriers + index);
  }
  static constexpr bool is_unit(uint16_t actor) { return actor >= kFirst && actor < kFirst + kCount; }
  // Units but the non-bulk copies access memory through the async proxy.
  static constexpr bool is_async(uint16_t actor) {
    return is_unit(actor) && (actor < kFirst + kBarriers || actor >= kFirst + 2 * kBarriers);
  }
};

class Clock {
 public:
  Clock() = default;
  explicit Clock(unsigned threads)
      : actors_(Units::kCount + (threads + kLanes - 1) / kLanes * kLanes), ticks_(2 * actors_) {}

  // The last atomic that acquired releases of other blocks, by any thread that this clock knows of.
  uint32_t acquired = 0;

  uint32_t known(uint16_t actor) const { return ticks_[index(actor)]; }
  uint32_t fenced(uint16_t actor) const { return ticks_[actors_ + index(actor)]; }
  void know(uint16_t actor, uint32_t tick) { raise(ticks_[index(actor)], tick); }
  void fence(uint16_t actor, uint32_t tick) { raise(ticks_[actors_ + index(actor)], tick); }

  void join(const Clock& other) {
    for (size_t i = 0; i < ticks_.size(); ++i) raise(ticks_[i], other.ticks_[i]);
    raise(acquired, other.acquired);
  }
  // Keeps what both know.
  void meet(const Clock& other) {
    for (size_t i = 0; i < ticks_.size(); ++i) ticks_[i] = std::min(ticks_[i], other.ticks_[i]);
  }

 private:
  static size_t index(uint16_t actor) {
    return actor >= Units::kFirst ? actor - Units::kFirst : size_t{Units::kCount} + actor;
  }
  static void raise(uint32_t& tick, uint32_t to) { tick = std::max(tick, to); }

  size_t actors_ = 0;
  std::vector<uint32_t> ticks_;  // known, then fenced
};

}  // namespace ptx
