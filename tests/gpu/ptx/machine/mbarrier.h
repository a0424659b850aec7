// An mbarrier object of shared memory, as the PTX ISA defines it: a phase completes when as many arrivals as
// expected and all bytes of asynchronous copies have come.
#pragma once

#include <cstdint>
#include <string>

#include "clocks.h"

namespace ptx {

struct Mbarrier {
  static constexpr uint32_t kMaxCount = (1u << 20) - 1;
  static constexpr int64_t kMaxBytes = (1 << 20) - 1;

  uint32_t expected = 0, pending = 0;  // arrivals
  int64_t bytes = 0;                   // of copies still to come; negative: came before they were expected
  uint64_t phase = 0;                  // number of completed ones
  Clock arriving, completed;           // what the threads know that arrived; of completed phases
  int index = 0;                       // among the block's
  uint32_t made = 0;                   // tick of init
  uint16_t maker = 0;                  // thread
  bool fenced = false;                 // whether init has been made visible to copies
  int in_flight = 0;                   // copies that will arrive here

  bool is_done() const { return pending == 0 && bytes == 0; }
  void next_phase() {
    ++phase;
    pending = expected;
    completed = arriving;
  }
  // Whether the phase of this parity, the current or the one before it, has completed.
  bool passed(uint32_t parity) const { return (phase & 1) != parity; }

  std::string text(uint32_t offset) const {
    return "the mbarrier at byte " + std::to_string(offset) + ", whose phase " + std::to_string(phase) +
           " waits for " + std::to_string(pending) + " of " + std::to_string(expected) + " arrivals and " +
           std::to_string(bytes) + " bytes";
  }
};

}  // namespace ptx
