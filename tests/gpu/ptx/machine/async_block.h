// What a block has whose warps take different roles: mbarriers, named barriers, copies in flight, and the
// warpgroups that meet at wgmma.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <vector>

#include "clocks.h"
#include "mbarrier.h"
#include "registers_in_flight.h"

namespace ptx {

struct Instruction;
struct Warp;

// Something that lands at a random later time.
struct Landing {
  std::function<void()> land;
  uint32_t thread;
  uint16_t site;
};

// Warps that wait for others, at bar.sync with a count or at an instruction of their warpgroup.
struct Meeting {
  std::vector<Warp*> asleep;
  const Instruction* at = nullptr;
  uint32_t count = 0, arrived = 0;  // threads
  Clock clock;                      // what they know together
};

struct AsyncBlock {
  static constexpr int kNamedBarriers = 16;

  AsyncBlock(unsigned threads, uint32_t registers_per_thread)
      : clocks(threads, Clock(threads)),
        empty(threads),
        registers((threads + kLanes - 1) / kLanes),
        register_limit((threads + kLanes - 1) / kLanes, registers_per_thread),
        register_pool(registers_per_thread * static_cast<uint32_t>(register_limit.size())) {}

  std::vector<Clock> clocks;    // by thread
  std::map<int, Clock> fences;  // of threads, at their last fence for other blocks
  Clock empty;
  std::map<uint32_t, Mbarrier> barriers;  // by offset
  int barriers_made = 0;
  std::vector<Landing> landings;
  bool has_returned = false;  // all threads, with nothing in flight
  uint32_t copies = 0;        // cp.async issued, to know which ones an arrival waits for
  std::array<Meeting, kNamedBarriers> named;
  std::array<Meeting, Units::kWarpgroups> warpgroups;
  std::vector<RegistersInFlight> registers;  // by warp
  // Registers per thread, by warp; and their sum at the start, which setmaxnreg redistributes.
  std::vector<uint32_t> register_limit;
  uint32_t register_pool;
};

}  // namespace ptx
