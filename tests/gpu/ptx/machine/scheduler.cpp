#include "scheduler.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <numeric>

#include "../text/module.h"
#include "fault_handler.h"

namespace ptx {
namespace {

Scheduler& scheduler() {
  static auto* const instance = new Scheduler;
  return *instance;
}

}  // namespace

// ---- Blocks and launches ------------------------------------------------------------------------------

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
  grid.same_writes = launch.same_writes;
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
    warp->again = false;
    warp->parked.clear();
    ready_.push_back(warp.get());
  }
  memory.start_block(block);
}

// Replaces blocks that have returned by waiting ones.
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
    // Drops copies that a fault left in flight.
    if (block.warps.size() > warps) block.shadow->clear();
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
  while (!ready_.empty() || land_one(1)) {
    if (entry_->is_async) land_one(8);
    if (ready_.empty()) continue;
    const size_t chosen = random() % ready_.size();
    Warp& warp = *ready_[chosen];
    const int steps = 1 + static_cast<int>(random() % 128);
    memory.instructions_since_progress += steps;
    if (memory.instructions_since_progress > kPatience) {
      fail(warp, warp.lanes, entry_->code[warp.pc],
           "endless loop: waits for nothing, and nothing else has happened for 2^27 instructions");
    }
    if (step(warp, steps)) continue;
    // Barriers only append.
    ready_[chosen] = ready_.back();
    ready_.pop_back();
    if (warp.block->exited == static_cast<int>(grid.threads)) start_blocks();
  }
  explain_wait();
}

// Of the copies in flight, lets a random one land with a chance of 1 in `chance`.
bool Scheduler::land_one(size_t chance) {
  size_t in_flight = 0;
  for (size_t i = 0; i < resident_; ++i) {
    if (blocks_[i]->async != nullptr) in_flight += blocks_[i]->async->landings.size();
  }
  if (in_flight == 0 || random() % chance != 0) return false;
  size_t chosen = random() % in_flight;
  for (size_t i = 0; i < resident_; ++i) {
    if (blocks_[i]->async == nullptr) continue;
    auto& landings = blocks_[i]->async->landings;
    if (chosen < landings.size()) {
      const Landing landing = std::move(landings[chosen]);
      landings.erase(landings.begin() + static_cast<int64_t>(chosen));
      landing.land();
      memory.progress();
      return true;
    }
    chosen -= landings.size();
  }
  return false;
}

// Nothing can run: all blocks have returned, or wait for what never comes.
void Scheduler::explain_wait() const {
  for (size_t i = 0; i < resident_; ++i) {
    const Block& block = *blocks_[i];
    if (block.index < 0 || block.exited == static_cast<int>(grid.threads)) continue;
    for (const auto& warp : block.warps) {
      for (const Parked& parked : warp->parked) {
        fail(*warp, parked.lanes, entry_->code[parked.pc], "waits for lanes that never arrive");
      }
    }
    if (block.async != nullptr) {
      const auto explain = [](const Meeting& meeting) {
        if (meeting.asleep.empty()) return;
        fail(*meeting.asleep.front(), meeting.asleep.front()->lanes, *meeting.at,
             "deadlock: waits for warps that never arrive, " + std::to_string(meeting.arrived) + " of " +
                 std::to_string(meeting.count) + " threads have");
      };
      for (const Meeting& meeting : block.async->named) explain(meeting);
      for (const Meeting& meeting : block.async->warpgroups) explain(meeting);
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

// ---- Faults -------------------------------------------------------------------------------------------

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

// ---- machine.h ----------------------------------------------------------------------------------------

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
