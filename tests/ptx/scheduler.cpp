// Runs a kernel: warps of a few blocks in turn, lanes of a warp together as long as they agree.
#include <pthread.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <numeric>
#include <string>

#include "fault_handler.h"
#include "memory.h"
#include "module.h"
#include "warp.h"

namespace ptx {
namespace {

class Scheduler {
 public:
  void run(Module& module, const std::string& name, const Launch& launch);
  Memory memory;
  bool is_here() const { return running_ && pthread_equal(pthread_self(), host_) != 0; }

 private:
  uint32_t random() {
    random_ ^= random_ << 13;
    random_ ^= random_ >> 7;
    random_ ^= random_ << 17;
    return static_cast<uint32_t>(random_ >> 16);
  }
  void set_grid(Module& module, Entry& entry, const Launch& launch);
  void fill_registers();
  void start_block(Block& block, int64_t index);
  void start_blocks();
  void run_all();

  // Whether the warp goes on.
  bool step(Warp& warp, int steps);
  bool choose(Warp& warp);
  bool branch(Warp& warp, const Instruction& i);
  bool finish(Warp& warp, const Instruction& i);
  bool meet(Warp& warp, const Instruction& i);
  bool reach_barrier(Warp& warp, const Instruction& i);
  void split(Warp& warp, uint32_t lanes);
  void set_join(Warp& warp) const;

  std::mutex mutex_;
  pthread_t host_{};
  bool running_ = false;
  sigjmp_buf jump_;
  const void* fault_ = nullptr;
  Entry* entry_ = nullptr;
  std::vector<std::unique_ptr<Block>> blocks_;
  size_t resident_ = 0;
  std::vector<int64_t> waiting_;
  std::vector<Warp*> ready_;
  std::vector<std::byte> registers_;
  uint64_t random_ = 1;
};

Scheduler& scheduler() {
  static auto* const instance = new Scheduler;
  return *instance;
}

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

// ---- Lanes of a warp
// -----------------------------------------------------------------------------------------

void Scheduler::set_join(Warp& warp) const {
  warp.join = UINT32_MAX;
  for (const Parked& parked : warp.parked) {
    if (parked.why == Parked::Why::kTurn) warp.join = std::min(warp.join, parked.pc);
  }
}

// Takes the lanes that are least far, of those that can go on; false if none can.
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

// Lanes whose guard does not hold go on without the others.
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
  warp.lanes = 0;
  return choose(warp);
}

// At a collective: runs it when all that it is for are here.
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
  i.execute(warp, i);
  ++warp.pc;
  return warp.pc < warp.join || choose(warp);
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
  for (const auto& each : block.warps) {
    each->lanes = each->at_barrier;
    each->pc = block.barrier_pc + 1;
    each->at_barrier = 0;
    if (each.get() != &warp) ready_.push_back(each.get());
  }
  return true;
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
      if (active != 0) i.execute(warp, i);
      ++warp.pc;
      if (i.kind == Kind::kAtomic && active != 0) {
        steps = 0;
        // Lanes that try again and again may wait for those that are behind.
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
    const bool goes_on = i.kind == Kind::kCollective ? meet(warp, i)
                         : i.kind == Kind::kBarrier  ? reach_barrier(warp, i)
                                                     : finish(warp, i);
    if (!goes_on) return false;
  }
  return true;
}

// ---- Blocks and launches
// -------------------------------------------------------------------------------------

void Scheduler::set_grid(Module& module, Entry& entry, const Launch& launch) {
  if (launch.threads == 0 || launch.threads > kMaxThreads ||
      launch.threads > static_cast<unsigned>(entry.max_threads)) {
    throw Fault(entry.readable + ": a launch with " + std::to_string(launch.threads) + " threads");
  }
  int64_t end = 0;
  for (const Entry::Parameter& parameter : entry.parameters) end = parameter.offset + parameter.bytes;
  grid.parameters.assign(static_cast<size_t>(end), std::byte{});
  for (size_t i = 0; i < entry.parameters.size(); ++i) {
    const Entry::Parameter& parameter = entry.parameters[i];
    std::memcpy(&grid.parameters[static_cast<size_t>(parameter.offset)], launch.arguments[i],
                static_cast<size_t>(parameter.bytes));
  }
  constexpr int64_t kAlign = 16;
  grid.entry = &entry;
  grid.sites = &module.lines.sites;
  grid.constants = &module.constants;
  grid.target = module.target;
  grid.blocks = launch.blocks * launch.blocks_y * launch.blocks_z;
  grid.blocks_x = launch.blocks;
  grid.blocks_y = launch.blocks_y;
  grid.threads = launch.threads;
  grid.shared_bytes = (entry.static_shared + kAlign - 1) / kAlign * kAlign + launch.shared_bytes;
  if (launch.shared_bytes < 0 ||
      grid.shared_bytes > std::min(options().shared_limit, Memory::kMaxSharedBytes)) {
    throw Fault(entry.readable + ": a launch with " + std::to_string(grid.shared_bytes) +
                " bytes of shared memory, more than the card has");
  }
  for (const SharedAddress& address : entry.shared_addresses) {
    std::byte* at = entry.constants.data() + entry.constants.size() + address.at;
    const int64_t value = options().first_shared_address + address.offset;
    for (int lane = 0; lane < kLanes; ++lane) {
      std::memcpy(at + lane * address.bytes, &value, static_cast<size_t>(address.bytes));
    }
  }
}

void Scheduler::start_block(Block& block, int64_t index) {
  block.index = index;
  block.waiting = block.exited = 0;
  for (const auto& warp : block.warps) {
    // The last warp may have fewer lanes.
    const unsigned lanes = grid.threads - static_cast<unsigned>(warp->index * kLanes);
    warp->pc = 0;
    warp->lanes = lanes >= kLanes ? kAllLanes : (1u << lanes) - 1;
    warp->join = UINT32_MAX;
    warp->at_barrier = 0;
    warp->exited = ~warp->lanes;
    warp->parked.clear();
    ready_.push_back(warp.get());
  }
  memory.start_block(block);
}

// Puts waiting blocks in the place of those that have returned.
void Scheduler::start_blocks() {
  for (size_t i = 0; i < resident_; ++i) {
    Block& block = *blocks_[i];
    if (block.index >= 0 && block.exited == static_cast<int>(grid.threads)) block.index = -1;
    if (block.index < 0 && !waiting_.empty()) {
      start_block(block, waiting_.back());
      waiting_.pop_back();
    }
  }
}

void Scheduler::fill_registers() {
  const size_t warps = (grid.threads + kLanes - 1) / kLanes;
  const auto bytes = (static_cast<size_t>(entry_->register_bytes) + 63) / 64 * 64;
  if (registers_.size() < resident_ * warps * bytes + 64) registers_.resize(resident_ * warps * bytes + 64);
  const auto address = reinterpret_cast<uintptr_t>(registers_.data());
  std::byte* at = registers_.data() + (64 - address % 64) % 64;
  for (size_t slot = 0; slot < resident_; ++slot) {
    if (blocks_.size() == slot) {
      blocks_.push_back(std::make_unique<Block>());
      memory.place(*blocks_.back(), static_cast<int>(slot));
    }
    Block& block = *blocks_[slot];
    block.index = -1;
    while (block.warps.size() < warps) block.warps.push_back(std::make_unique<Warp>());
    block.warps.resize(warps);
    for (size_t i = 0; i < warps; ++i) {
      Warp& warp = *block.warps[i];
      warp.registers = at;
      warp.constants = entry_->constants.data() + entry_->constants.size();
      warp.block = &block;
      warp.memory = &memory;
      warp.index = static_cast<int>(i);
      at += bytes;
    }
  }
}

void Scheduler::run_all() {
  constexpr int64_t kPatience = int64_t{1} << 27;
  start_blocks();
  while (!ready_.empty()) {
    const size_t chosen = random() % ready_.size();
    Warp& warp = *ready_[chosen];
    const int steps = 1 + static_cast<int>(random() % 128);
    memory.instructions_since_progress += steps;
    if (memory.instructions_since_progress > kPatience) {
      fail(warp, warp.lanes, entry_->code[warp.pc],
           "does not wait for others in this loop, be it endless: nothing else has happened for 2^27 "
           "instructions");
    }
    if (step(warp, steps)) continue;
    // Barriers add to the end alone.
    ready_[chosen] = ready_.back();
    ready_.pop_back();
    if (warp.block->exited == static_cast<int>(grid.threads)) start_blocks();
  }
  for (size_t i = 0; i < resident_; ++i) {
    const Block& block = *blocks_[i];
    if (block.index < 0 || block.exited == static_cast<int>(grid.threads)) continue;
    for (const auto& warp : block.warps) {
      for (const Parked& parked : warp->parked) {
        fail(*warp, parked.lanes, entry_->code[parked.pc], "waits for lanes that never come");
      }
    }
    throw Fault(entry_->readable + ": all threads wait");
  }
}

void Scheduler::run(Module& module, const std::string& name, const Launch& launch) {
  const std::lock_guard<std::mutex> lock(mutex_);
  Entry& entry = module.entry(name);
  module.read(entry);
  set_grid(module, entry, launch);
  entry_ = &entry;
  random_ = (uint64_t{options().seed} + 1) * 0x9e3779b97f4a7c15u | 1u;
  const int wanted = options().resident_blocks > 0 ? std::min(options().resident_blocks, kMaxResidentBlocks)
                                                   : 2 + static_cast<int>(random() % 2);
  resident_ = std::min<size_t>(static_cast<size_t>(wanted), grid.blocks);
  ready_.clear();
  memory.start_launch();
  fill_registers();
  waiting_.resize(grid.blocks);
  std::iota(waiting_.begin(), waiting_.end(), int64_t{0});
  for (size_t i = waiting_.size(); i > 1; --i) std::swap(waiting_[i - 1], waiting_[random() % i]);

  struct Running {
    bool& running;
    ~Running() { running = false; }
  } const running{running_};
  host_ = pthread_self();
  running_ = true;
  const FaultHandler handler([] { return scheduler().is_here(); }, jump_, fault_);
  if (sigsetjmp(jump_, 0) != 0) {
    const Memory::Now now = memory.now;
    memory.now = {};
    if (now.warp == nullptr) throw Fault(entry_->readable + ": segmentation fault of the machine itself");
    const auto fault = reinterpret_cast<uint64_t>(fault_);
    int lane = __builtin_ctz(now.warp->active);
    for_lanes(now.warp->active, [&](int each) {
      if (fault - now.addresses[each] < static_cast<uint64_t>(now.bytes)) lane = each;
    });
    fail(*now.warp, lane, now.at->site, "segmentation fault");
  }
  run_all();
  memory.banks.end_launch(module.lines.sites);
}

}  // namespace

// ---- Faults
// --------------------------------------------------------------------------------------------------

std::string lane_list(uint32_t lanes) {
  std::string list;
  for (int lane = 0; lane < kLanes; ++lane) {
    if ((lanes >> lane & 1) != 0) list += (list.empty() ? "" : ", ") + std::to_string(lane);
  }
  return ((lanes & (lanes - 1)) == 0 ? "lane " : "lanes ") + list;
}

std::string site_text(uint16_t site) { return (*grid.sites)[site]; }

void fail(const Warp& warp, int lane, uint16_t site, const std::string& what) {
  throw Fault(grid.entry->readable + ", block " + std::to_string(warp.block->index) + ", thread " +
              std::to_string(thread_of(warp, lane)) + ", " + site_text(site) + ": " + what + " (seed " +
              std::to_string(options().seed) + ")");
}

void fail(const Warp& warp, uint32_t lanes, const Instruction& at, const std::string& what) {
  fail(warp, lanes != 0 ? __builtin_ctz(lanes) : 0, at.site, what);
}

// ---- machine.h
// -----------------------------------------------------------------------------------------------

void run(Module& module, const std::string& entry, const Launch& launch) {
  scheduler().run(module, entry, launch);
}

Options& options() {
  static Options all = [] {
    Options start;
    const char* seed = std::getenv("PEFT_KERNELS_PTX_SEED");
    if (seed != nullptr) start.seed = static_cast<uint32_t>(std::strtoul(seed, nullptr, 10));
    return start;
  }();
  return all;
}

std::map<std::string, BankCount> bank_counts() { return scheduler().memory.banks.totals; }
void reset_bank_counts() { scheduler().memory.banks.totals.clear(); }

}  // namespace ptx
