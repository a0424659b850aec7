// What kernels with specialised warps use in addition to mbarriers: barriers of some of the warps, an elected
// lane, the redistribution of registers, and fences of the async proxy.
#include "warpgroups.h"

#include <string>

#include "../machine/memory.h"
#include "../machine/warp.h"
#include "decode.h"

namespace ptx {

Meeting& meet_warpgroup(Warp& warp, const Instruction& i) {
  Block& block = *warp.block;
  const int group = warp.index / kWarpsPerGroup;
  if (block.warps.size() < static_cast<size_t>((group + 1) * kWarpsPerGroup)) {
    fail(warp, warp.active, i, "needs a warpgroup of four warps");
  }
  Meeting& meeting = block.async->warpgroups[static_cast<size_t>(group)];
  if (meeting.arrived == 0) {
    meeting.at = &i;
    meeting.count = kWarpsPerGroup * kLanes;
  } else if (meeting.at != &i) {
    fail(warp, warp.active, i,
         "another warp of the warpgroup waits at another instruction (" + site_text(meeting.at->site) + ")");
  }
  meeting.arrived += kLanes;
  warp.meeting = &meeting;
  return meeting;
}

void require_sm_90a(Decoder& decoder) {
  if (!decoder.module().is_for_one_architecture || decoder.module().target != 90) {
    decoder.fail("an instruction of sm_90a alone");
  }
}

namespace {

// ---- bar with a count ---------------------------------------------------------------------------------

uint32_t uniform(const Warp& warp, int32_t at, const Instruction& i) {
  const auto* values = warp.in<uint32_t>(at);
  for (int lane = 1; lane < kLanes; ++lane) {
    if (values[lane] != values[0]) fail(warp, lane, i.site, "lanes with different operands");
  }
  return values[0];
}

template <bool kWaits>
void reach_named(Warp& warp, const Instruction& i) {
  AsyncBlock& async = *warp.block->async;
  const uint32_t number = uniform(warp, i.a, i), count = uniform(warp, i.b, i);
  if (number >= AsyncBlock::kNamedBarriers) fail(warp, warp.active, i, "there are 16 barriers");
  if (count == 0 || count % kLanes != 0 || count > grid.threads) {
    fail(warp, warp.active, i, "a barrier of " + std::to_string(count) + " threads");
  }
  Meeting& meeting = async.named[number];
  if (meeting.arrived == 0) {
    meeting.at = &i;
    meeting.count = count;
    meeting.clock = async.empty;
  } else if (meeting.count != count) {
    fail(warp, warp.active, i,
         "a barrier of " + std::to_string(count) + " threads, at which others wait for " +
             std::to_string(meeting.count) + " (" + site_text(meeting.at->site) + ")");
  }
  meeting.arrived += kLanes;
  for_lanes(warp.active, [&](int lane) { warp.memory->release_to(meeting.clock, warp, lane); });
  const bool is_last = meeting.arrived == meeting.count;
  if (is_last) {
    for (Warp* const each : meeting.asleep) {
      for (int lane = 0; lane < kLanes; ++lane) clock_of(*each, lane).join(meeting.clock);
    }
  }
  if (is_last && kWaits) {
    for (int lane = 0; lane < kLanes; ++lane) clock_of(warp, lane).join(meeting.clock);
  }
  if (kWaits || is_last) warp.meeting = &meeting;
}

// ---- Others -------------------------------------------------------------------------------------------

// Which lane is up to the hardware, here to the seed.
void elect(Warp& warp, const Instruction& i) {
  const int leader = options().seed % 2 == 0 ? __builtin_ctz(warp.active) : 31 - __builtin_clz(warp.active);
  alignas(64) uint32_t result[kLanes];
  for (uint32_t& each : result) each = static_cast<uint32_t>(leader);
  keep(warp, i.d, result);
  warp.set_predicate(i.e, 1u << leader);
}

// An increase waits until other warpgroups have given up as many registers.
void set_registers(Warp& warp, const Instruction& i) {
  AsyncBlock& async = *warp.block->async;
  const uint32_t wanted = i.target;
  uint32_t& mine = async.register_limit[static_cast<size_t>(warp.index)];
  const bool increases = i.count != 0;
  if (increases ? wanted < mine : wanted > mine) {
    fail(warp, warp.active, i,
         "setmaxnreg from " + std::to_string(mine) + " registers to " + std::to_string(wanted));
  }
  const Meeting& meeting = meet_warpgroup(warp, i);
  if (meeting.arrived < meeting.count) return;
  uint32_t others = 0;
  const size_t first = static_cast<size_t>(warp.index / kWarpsPerGroup * kWarpsPerGroup);
  for (size_t each = 0; each < async.register_limit.size(); ++each) {
    if (each < first || each >= first + kWarpsPerGroup) others += async.register_limit[each];
  }
  if (others + kWarpsPerGroup * wanted > async.register_pool) {
    warp.meeting->arrived -= kLanes;
    warp.meeting = nullptr;
    warp.again = true;
    warp.memory->count_poll(
        warp, 0,
        [&] {
          return std::to_string(wanted) + " registers per thread, but the block has " +
                 std::to_string(async.register_pool) + " for its warps, of which others hold " +
                 std::to_string(others);
        },
        i);
    return;
  }
  for (size_t each = first; each < first + kWarpsPerGroup; ++each) async.register_limit[each] = wanted;
}

// Makes what the thread has written visible to bulk copies and wgmma; and what arrived by cp.async, for which
// no thread could do so earlier.
void fence_proxy(Warp& warp, const Instruction&) {
  AsyncBlock& async = *warp.block->async;
  for_lanes(warp.active, [&](int lane) {
    Clock& clock = clock_of(warp, lane);
    clock.fence(static_cast<uint16_t>(thread_of(warp, lane)), warp.memory->advance());
    for (int barrier = 0; barrier < async.barriers_made; ++barrier) {
      clock.fence(Units::copy(barrier), clock.known(Units::copy(barrier)));
    }
    for (auto& [offset, barrier] : async.barriers) barrier.fenced |= barrier.maker == thread_of(warp, lane);
  });
}
void fence_init(Warp& warp, const Instruction&) {
  for_lanes(warp.active, [&](int lane) {
    for (auto& [offset, barrier] : warp.block->async->barriers) {
      barrier.fenced |= barrier.maker == thread_of(warp, lane);
    }
  });
}

bool decode_registers(Decoder& decoder, const Decoder::Words& words, Instruction& instruction) {
  constexpr int64_t kLeast = 24, kMost = 256, kUnit = 8;
  const int64_t count = decoder.operand(0).value;
  if ((words[1] != "inc" && words[1] != "dec") || words[2] != "sync" || words[3] != "aligned") return false;
  if (count < kLeast || count > kMost || count % kUnit != 0) {
    decoder.fail("expected a multiple of 8 from 24 to 256");
  }
  instruction.target = static_cast<uint32_t>(count);
  instruction.count = words[1] == "inc" ? 1 : 0;
  instruction.kind = Kind::kMeeting;
  instruction.execute = set_registers;
  return true;
}

}  // namespace

bool decode_warpgroup(Decoder& decoder, const Decoder::Words& words) {
  Instruction instruction = decoder.begin();
  const bool is_barrier =
      (words[0] == "bar" || words[0] == "barrier") && decoder.statement().operands.size() == 2;
  if (is_barrier && (words.has("sync") || words.has("arrive"))) {
    instruction.kind = Kind::kMeeting;
    instruction.a = decoder.source(decoder.operand(0), 4);
    instruction.b = decoder.source(decoder.operand(1), 4);
    instruction.execute = words.has("sync") ? reach_named<true> : reach_named<false>;
    instruction.members = decoder.constant(-1, 4);
  } else if (words[0] == "elect" && words[1] == "sync") {
    const Operand& to = decoder.operand(0);
    if (to.kind != Operand::Kind::kPair) return false;
    instruction.kind = Kind::kCollective;
    instruction.d = decoder.destination(to.list[0], 4);
    instruction.e = decoder.destination(to.list[1], 0);
    instruction.members = decoder.source(decoder.operand(1), 4);
    instruction.execute = elect;
  } else if (words[0] == "setmaxnreg") {
    require_sm_90a(decoder);
    if (!decode_registers(decoder, words, instruction)) return false;
    instruction.members = decoder.constant(-1, 4);
  } else if (words[0] == "fence" && words[1] == "proxy" && words[2] == "async") {
    if (words.parts.size() > 3 && words[3] != "shared::cta" && words[3] != "global") return false;
    instruction.execute = fence_proxy;
  } else if (words[0] == "fence" && words[1] == "mbarrier_init") {
    instruction.execute = fence_init;
  } else {
    return false;
  }
  decoder.emit_async(instruction);
  return true;
}

}  // namespace ptx
