// Schedules the lanes of a warp: they run together, diverge at branches and reconverge when the lanes
// furthest behind reach the others; collectives and barriers wait for all their members.
#include <algorithm>
#include <string>

#include "scheduler.h"

namespace ptx {
namespace {

std::string waiting_lanes(const Warp& warp) {
  uint32_t lanes = 0, pc = 0;
  for (const Parked& parked : warp.parked) {
    if (parked.why == Parked::Why::kCollective) {
      lanes |= parked.lanes;
      pc = parked.pc;
    }
  }
  const auto& text = grid.entry->texts[pc];
  return lane_list(lanes) + " of the warp wait at " + std::string(text.substr(0, text.find_first_of(" \t"))) +
         " (" + site_text(grid.entry->code[pc].site) + ")";
}

bool any_at_collective(const Warp& warp) {
  for (const Parked& parked : warp.parked) {
    if (parked.why == Parked::Why::kCollective) return true;
  }
  return false;
}

std::string opcode_text(const Instruction& i) {
  const auto& text = grid.entry->texts[static_cast<size_t>(&i - grid.entry->code.data())];
  size_t begin = 0;
  if (text[0] == '@') begin = text.find_first_not_of(" \t", text.find_first_of(" \t"));
  return std::string(text.substr(begin, text.find_first_of(" \t", begin) - begin));
}

}  // namespace

// ---- Lanes of a warp ----------------------------------------------------------------------------------

void Scheduler::set_join(Warp& warp) const {
  warp.join = UINT32_MAX;
  for (const Parked& parked : warp.parked) {
    if (parked.why == Parked::Why::kTurn) warp.join = std::min(warp.join, parked.pc);
  }
}

// Picks the lanes furthest behind among those that can run; false if none can.
bool Scheduler::choose(Warp& warp) {
  if (warp.lanes != 0) {
    warp.parked.push_back({Parked::Why::kTurn, warp.pc, warp.lanes});
    warp.lanes = 0;
  }
  set_join(warp);
  if (warp.join == UINT32_MAX) {
    for (Parked& parked : warp.parked) {
      if (parked.why == Parked::Why::kYield) parked.why = Parked::Why::kTurn;
    }
    set_join(warp);
    if (warp.join == UINT32_MAX) return false;
  }
  warp.pc = warp.join;
  size_t kept = 0;
  for (const Parked& parked : warp.parked) {
    if (parked.why == Parked::Why::kTurn && parked.pc == warp.pc) {
      warp.lanes |= parked.lanes;
    } else {
      warp.parked[kept++] = parked;
    }
  }
  warp.parked.resize(kept);
  set_join(warp);
  return true;
}

bool Scheduler::branch(Warp& warp, const Instruction& i) {
  uint32_t taken = warp.lanes;
  if (i.guard != Instruction::kUnguarded) {
    const uint32_t holds = warp.predicate(i.guard);
    taken &= i.negated ? ~holds : holds;
  }
  if (taken == warp.lanes) {
    warp.pc = i.target;
  } else {
    ++warp.pc;
    if (taken != 0) {
      warp.parked.push_back({Parked::Why::kTurn, i.target, taken});
      warp.lanes &= ~taken;
      return choose(warp);
    }
  }
  return warp.pc < warp.join || choose(warp);
}

// Lanes whose guard is false continue without the others.
void Scheduler::split(Warp& warp, uint32_t lanes) {
  warp.parked.push_back({Parked::Why::kTurn, warp.pc + 1, warp.lanes & ~lanes});
  warp.lanes = lanes;
  set_join(warp);
}

bool Scheduler::finish(Warp& warp, const Instruction& i) {
  Block& block = *warp.block;
  const uint32_t lanes = warp.lanes;
  warp.exited |= lanes;
  block.exited += __builtin_popcount(lanes);
  memory.progress();
  if (any_at_collective(warp)) fail(warp, lanes, i, "returned, but " + waiting_lanes(warp));
  if (block.waiting != 0) {
    fail(warp, lanes, i,
         "returned, but " + std::to_string(block.waiting) + " threads wait at a barrier (" +
             site_text(entry_->code[block.barrier_pc].site) + ")");
  }
  if (block.async != nullptr && block.exited == static_cast<int>(grid.threads)) {
    block.async->has_returned = block.async->landings.empty();
    if (!block.async->has_returned) {
      const Landing& landing = block.async->landings.front();
      fail(warp, lanes, i,
           "the block returned while an asynchronous copy of thread " + std::to_string(landing.thread) +
               " (" + site_text(landing.site) + ") is in flight");
    }
  }
  warp.lanes = 0;
  return choose(warp);
}

// At a collective: runs it once all members have arrived.
bool Scheduler::meet(Warp& warp, const Instruction& i) {
  const uint32_t lane = static_cast<uint32_t>(__builtin_ctz(warp.lanes));
  const uint32_t members = warp.in<uint32_t>(i.members)[lane];
  uint32_t here = warp.lanes;
  if (here != members) {
    const std::string name = opcode_text(i);
    if ((here & ~members) != 0) fail(warp, here & ~members, i, name + " by lanes that are not in its mask");
    if ((warp.exited & members) != 0) {
      fail(warp, here, i, name + ", but " + lane_list(warp.exited & members) + " returned");
    }
    if ((warp.at_barrier & members) != 0) {
      fail(warp, here, i,
           name + ", but " + lane_list(warp.at_barrier & members) + " wait at a barrier (" +
               site_text(entry_->code[warp.block->barrier_pc].site) + ")");
    }
    size_t kept = 0;
    for (const Parked& parked : warp.parked) {
      if (parked.why == Parked::Why::kCollective && parked.pc == warp.pc) {
        here |= parked.lanes;
      } else if (parked.why == Parked::Why::kCollective && (parked.lanes & members) != 0) {
        fail(warp, warp.lanes, i, name + ", but " + waiting_lanes(warp));
      } else {
        warp.parked[kept++] = parked;
      }
    }
    warp.parked.resize(kept);
    if (here != members) {
      warp.parked.push_back({Parked::Why::kCollective, warp.pc, here});
      warp.lanes = 0;
      return choose(warp);
    }
    warp.lanes = here;
    set_join(warp);
  }
  warp.active = here;
  if (i.kind == Kind::kMeeting) return reach_meeting(warp, i);
  i.execute(warp, i);
  return pass(warp);
}

bool Scheduler::pass(Warp& warp) {
  if (!warp.again) ++warp.pc;
  warp.again = false;
  return warp.pc < warp.join || choose(warp);
}

// The handler, which runs for each warp that arrives, puts it into a meeting, and does what is to be done
// when the last one has come.
bool Scheduler::reach_meeting(Warp& warp, const Instruction& i) {
  i.execute(warp, i);
  Meeting* const meeting = warp.meeting;
  if (meeting == nullptr) return pass(warp);
  warp.meeting = nullptr;
  if (meeting->arrived < meeting->count) {
    meeting->asleep.push_back(&warp);
    return false;
  }
  for (Warp* const each : meeting->asleep) {
    ++each->pc;
    ready_.push_back(each);
  }
  meeting->asleep.clear();
  meeting->arrived = 0;
  memory.progress();
  return pass(warp);
}

bool Scheduler::reach_barrier(Warp& warp, const Instruction& i) {
  Block& block = *warp.block;
  const uint32_t lanes = warp.lanes;
  const std::string name = opcode_text(i);
  if (block.exited != 0) {
    fail(warp, lanes, i, name + ", but " + std::to_string(block.exited) + " threads of the block returned");
  }
  if (any_at_collective(warp)) fail(warp, lanes, i, name + ", but " + waiting_lanes(warp));
  if (block.waiting == 0) {
    block.barrier_pc = warp.pc;
  } else if (block.barrier_pc != warp.pc) {
    fail(warp, lanes, i,
         name + ", but " + std::to_string(block.waiting) + " threads wait at another one (" +
             site_text(entry_->code[block.barrier_pc].site) + ")");
  }
  warp.at_barrier |= lanes;
  block.waiting += __builtin_popcount(lanes);
  warp.lanes = 0;
  if (block.waiting < static_cast<int>(grid.threads)) return choose(warp);
  block.waiting = 0;
  block.epoch = memory.advance();
  block.acquired = block.threads_acquired;
  if (block.async != nullptr) {
    Clock all(grid.threads);
    for (const auto& each : block.warps) {
      for_lanes(each->at_barrier, [&](int lane) { memory.release_to(all, *each, lane); });
    }
    for (Clock& clock : block.async->clocks) clock.join(all);
  }
  for (const auto& each : block.warps) {
    each->lanes = each->at_barrier;
    each->pc = block.barrier_pc + 1;
    each->at_barrier = 0;
    if (each.get() != &warp) ready_.push_back(each.get());
  }
  return true;
}

// Keeps account of the registers of kernels with wgmma.
void Scheduler::touch(Warp& warp, const Instruction& i) const {
  RegistersInFlight& registers = warp.block->async->registers[static_cast<size_t>(warp.index)];
  const Entry::Touched& touched = entry_->touched[warp.pc];
  const auto check = [&](int32_t reg, const char* verb) {
    if (!registers.is_in_flight(reg)) return;
    const auto& state = registers.state(reg);
    fail(warp, warp.lanes, i,
         opcode_text(i) + " " + verb + " a register that wgmma (" + site_text(state.site) +
             ") has in flight as " + (state.is_operand ? "its A" : "accumulator") +
             ", with no wgmma.wait_group in between");
  };
  const bool moves_in_flight = touched.is_move && registers.is_in_flight(touched.read[0]);
  if (!touched.is_move) {
    for (const int32_t reg : touched.read) check(reg, "reads");
  }
  for (const int32_t reg : touched.written) {
    if (!moves_in_flight) check(reg, "writes");
    touched.is_move ? registers.move(reg, touched.read[0]) : registers.write(reg);
  }
}

bool Scheduler::step(Warp& warp, int steps) {
  const Instruction* const code = entry_->code.data();
  uint64_t* const times = entry_->times.data();
  while (steps-- > 0) {
    const Instruction& i = code[warp.pc];
    ++times[warp.pc];
    if (i.kind == Kind::kBranch) {
      if (!branch(warp, i)) return false;
      continue;
    }
    uint32_t active = warp.lanes;
    if (i.guard != Instruction::kUnguarded) {
      const uint32_t holds = warp.predicate(i.guard);
      active &= i.negated ? ~holds : holds;
    }
    if (i.kind == Kind::kPlain || i.kind == Kind::kAtomic || active == 0) {
      warp.active = active;
      if (active != 0) {
        if (!entry_->touched.empty()) touch(warp, i);
        i.execute(warp, i);
      }
      if (!warp.again) ++warp.pc;
      warp.again = false;
      if (i.kind == Kind::kAtomic && active != 0) {
        steps = 0;
        // Spinning lanes may be waiting for lanes that have not come as far.
        if (!warp.parked.empty() && random() % 4 == 0) {
          warp.parked.push_back({Parked::Why::kYield, warp.pc, warp.lanes});
          warp.lanes = 0;
          if (!choose(warp)) return false;
          continue;
        }
      }
      if (warp.pc >= warp.join && !choose(warp)) return false;
      continue;
    }
    if (active != warp.lanes) split(warp, active);
    if (!entry_->touched.empty()) touch(warp, i);
    const bool goes_on = i.kind == Kind::kCollective || i.kind == Kind::kMeeting ? meet(warp, i)
                         : i.kind == Kind::kBarrier                              ? reach_barrier(warp, i)
                                                                                 : finish(warp, i);
    if (!goes_on) return false;
  }
  return true;
}

}  // namespace ptx
