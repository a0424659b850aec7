#include "emulator.h"

#include <pthread.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "fault_handler.h"
#include "fiber.h"
#include "memory.h"
#include "threads.h"

namespace peft_kernels::simt {
namespace {

class Emulator {
 public:
  Emulator() {
    const char* seed = std::getenv("PEFT_KERNELS_SIMT_SEED");
    if (seed != nullptr) this->seed = std::strtoull(seed, nullptr, 10);
  }

  void run(const Launch& launch);

  // The rest is called on fibers.
  Thread& self() {
    if (current_ == nullptr) throw std::logic_error("a wrapper of device.cuh was called outside a kernel");
    return *current_;
  }
  const Launch& launch() const { return *launch_; }
  [[noreturn]] void run_thread();
  [[noreturn]] void stop(const std::string& what, const std::string& where);
  void collective(const char* name, void* given, void (*perform)(void* const*), Site site);
  void sync_threads(Site site);
  void pause(bool always);
  bool is_here() const { return current_ != nullptr && pthread_equal(pthread_self(), host_) != 0; }

  uint64_t seed = 0;
  int resident_blocks = 0;
  Site last_site;                 // of an access, by any thread
  int64_t accesses_in_a_row = 0;  // without a switch of threads
  Memory memory;

 private:
  uint32_t random() {
    random_ ^= random_ << 13;
    random_ ^= random_ >> 7;
    random_ ^= random_ << 17;
    return static_cast<uint32_t>(random_ >> 16);
  }
  void start_block(Block& block, int64_t index);
  bool start_blocks(std::vector<int64_t>& waiting);
  Thread* next_lane();
  void switch_to(Thread& thread);
  void leave(Thread& thread);

  std::mutex mutex_;
  const Launch* launch_ = nullptr;
  pthread_t host_{};
  Context main_;
  Thread* current_ = nullptr;
  Warp* warp_ = nullptr;  // whose lanes run, while they can
  std::deque<Block> blocks_;
  size_t resident_ = 0;       // of these
  std::vector<Warp*> warps_;  // of the resident blocks
  uint64_t random_ = 1;
  std::string error_;
};

Emulator& instance() {
  static auto* const instance = new Emulator;
  return *instance;
}
// What every access goes through, without the guard of a function's static.
Emulator& the = instance();

// ---- Scheduling ----------------------------------------------------------------------------------------

Thread* Emulator::next_lane() {
  if (warp_ == nullptr || warp_->ready == 0 || random() % 64 == 0) {
    warp_ = nullptr;
    const size_t first = random() % warps_.size();
    for (size_t i = 0; i < warps_.size() && warp_ == nullptr; ++i) {
      Warp* warp = warps_[(first + i) % warps_.size()];
      if (warp->ready != 0) warp_ = warp;
    }
    if (warp_ == nullptr) return nullptr;
  }
  const uint32_t turn = random() % kLanes;
  const uint64_t twice = uint64_t{warp_->ready} << 32 | warp_->ready;
  return &warp_->threads[(static_cast<uint32_t>(__builtin_ctzll(twice >> turn)) + turn) % kLanes];
}

void Emulator::switch_to(Thread& thread) {
  Thread* previous = current_;
  thread.warp->ready &= ~thread.lane_bit;
  current_ = &thread;
  accesses_in_a_row = 0;
  if (&thread != previous) switch_context(previous->context, thread.context);
}

// From a thread that waits now, or has returned.
void Emulator::leave(Thread& thread) {
  Thread* next = next_lane();
  if (next != nullptr) {
    switch_to(*next);
  } else {
    switch_context(thread.context, main_);
  }
}

void Emulator::stop(const std::string& what, const std::string& where) {
  const Thread& thread = self();
  error_ = demangled(launch_->kernel) + ", block " + std::to_string(thread.block->index) + ", thread " +
           std::to_string(thread.index) + ", " + where + ": " + what + " (seed " + std::to_string(seed) + ")";
  switch_context(current_->context, main_);
  std::abort();
}

void Emulator::run_thread() {
  Thread& thread = self();
  arrived(thread.context);
  launch_->entry(launch_->params);

  Warp& warp = *thread.warp;
  Block& block = *thread.block;
  warp.exited |= thread.lane_bit;
  ++block.exited;
  memory.progress();
  if (warp.at_collective != 0) {
    fail("returned, but " + waiting_lanes(warp), warp.collective_site);
  }
  if (block.waiting != 0) {
    fail("returned, but " + std::to_string(block.waiting) + " threads wait at sync_threads",
         block.barrier_site);
  }
  if (warp.exited == ~0u) memory.count_banks(warp);
  if (block.exited == launch_->threads) {
    switch_context(thread.context, main_);  // which starts another block on these stacks
  } else {
    leave(thread);
  }
  std::abort();
}

void Emulator::collective(const char* name, void* given, void (*perform)(void* const*), Site site) {
  Thread& thread = self();
  Warp& warp = *thread.warp;
  if (warp.exited != 0) fail(std::string(name) + ", but " + lane_list(warp.exited) + " returned", site);
  if (warp.at_barrier != 0) {
    fail(std::string(name) + ", but " + lane_list(warp.at_barrier) + " wait at sync_threads (" +
             text(thread.block->barrier_site) + ")",
         site);
  }
  if (warp.at_collective == 0) {
    warp.collective = name;
    warp.collective_site = site;
  } else if (!same(site, warp.collective_site) || std::strcmp(name, warp.collective) != 0) {
    fail(std::string(name) + ", but " + waiting_lanes(warp), site);
  }
  warp.at_collective |= thread.lane_bit;
  warp.given[thread.index % kLanes] = given;
  if (warp.at_collective == ~0u) {
    perform(warp.given);
    memory.count_banks(warp);
    warp.at_collective = 0;
    warp.ready = ~0u;
  }
  leave(thread);
}

void Emulator::sync_threads(Site site) {
  Thread& thread = self();
  Warp& warp = *thread.warp;
  Block& block = *thread.block;
  if (block.exited != 0) {
    fail("sync_threads, but " + std::to_string(block.exited) + " threads of the block returned", site);
  }
  if (warp.at_collective != 0) fail("sync_threads, but " + waiting_lanes(warp), site);
  if (block.waiting == 0) {
    block.barrier_site = site;
  } else if (!same(site, block.barrier_site)) {
    fail("sync_threads, but " + std::to_string(block.waiting) + " threads wait at another one (" +
             text(block.barrier_site) + ")",
         site);
  }
  warp.at_barrier |= thread.lane_bit;
  if (++block.waiting == launch_->threads) {
    block.waiting = 0;
    block.epoch = memory.advance();
    block.acquired = block.threads_acquired;
    for (Warp& each : block.warps) {
      each.at_barrier = 0;
      each.ready = ~0u;
      memory.count_banks(each);
    }
    warp_ = nullptr;
  }
  leave(thread);
}

void Emulator::pause(bool always) {
  if (!always && random() % 2 == 0) return;
  self().warp->ready |= self().lane_bit;
  warp_ = nullptr;
  leave(self());
}

// ---- Launches ------------------------------------------------------------------------------------------

bool on_fault(const void* address) {
  if (!the.is_here()) return false;
  the.stop(the.memory.in_shared(address) ? "shared memory through a plain pointer" : "segmentation fault",
           "soon after " + text(the.last_site));
}

void Emulator::start_block(Block& block, int64_t index) {
  if (block.threads.empty()) block.threads.resize(kMaxThreads);
  block.index = index;
  block.waiting = block.exited = 0;
  block.warps.resize(static_cast<size_t>(launch_->threads / kLanes));
  for (size_t i = 0; i < block.warps.size(); ++i) {
    Warp& warp = block.warps[i];
    warp.ready = ~0u;
    warp.at_collective = warp.at_barrier = warp.exited = 0;
    warp.block = &block;
    warp.threads = &block.threads[i * kLanes];
  }
  for (int i = 0; i < launch_->threads; ++i) {
    Thread& thread = block.threads[static_cast<size_t>(i)];
    if (thread.stack == nullptr) thread.stack = std::make_unique<Stack>();
    thread.stack->prepare(thread.context, [] { the.run_thread(); }, i);
    thread.block = &block;
    thread.warp = &block.warps[static_cast<size_t>(i / kLanes)];
    thread.index = i;
    thread.lane_bit = 1u << i % kLanes;
  }
  memory.start_block(block);
}

// Puts waiting blocks in the place of those that have returned. False when none is left.
bool Emulator::start_blocks(std::vector<int64_t>& waiting) {
  warps_.clear();
  warp_ = nullptr;
  for (size_t i = 0; i < resident_; ++i) {
    Block& block = blocks_[i];
    if (block.index >= 0 && block.exited == launch_->threads) block.index = -1;
    if (block.index < 0 && !waiting.empty()) {
      start_block(block, waiting.back());
      waiting.pop_back();
    }
    if (block.index < 0) continue;
    for (Warp& warp : block.warps) warps_.push_back(&warp);
  }
  return !warps_.empty();
}

void Emulator::run(const Launch& launch) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const FaultHandler handler(on_fault);
  launch_ = &launch;
  host_ = pthread_self();
  error_.clear();
  random_ = (seed + 1) * 0x9e3779b97f4a7c15u | 1u;
  memory.start_launch(launch);

  const int wanted = resident_blocks > 0 ? resident_blocks : 2 + static_cast<int>(random() % 2);
  resident_ = static_cast<size_t>(std::min<int64_t>(wanted, launch.blocks));
  for (size_t slot = blocks_.size(); slot < resident_; ++slot) memory.place(blocks_.emplace_back(), slot);
  for (Block& block : blocks_) block.index = -1;
  std::vector<int64_t> waiting(static_cast<size_t>(launch.blocks));
  std::iota(waiting.begin(), waiting.end(), int64_t{0});
  for (size_t i = waiting.size(); i > 1; --i) std::swap(waiting[i - 1], waiting[random() % i]);

  while (start_blocks(waiting)) {
    Thread* next = next_lane();
    if (next == nullptr) throw std::logic_error(demangled(launch.kernel) + ": all threads wait");
    next->warp->ready &= ~next->lane_bit;
    current_ = next;
    switch_context(main_, next->context);
    current_ = nullptr;
    if (!error_.empty()) throw std::runtime_error(error_);
  }
}

char* access(const void* p, int bytes, Memory::Kind kind, Site site) {
  the.last_site = site;
  constexpr int64_t kPatience = int64_t{1} << 25;
  if (++the.accesses_in_a_row > kPatience) {
    fail("does not wait for others in this loop, be it endless: to wait for a counter, add 0 to it", site);
  }
  return the.memory.access(the.self(), p, bytes, kind, site);
}

}  // namespace

void fail(const std::string& what, Site site) { the.stop(what, text(site)); }

Position position() {
  const Thread& thread = the.self();
  return {thread.index, static_cast<int>(thread.block->index), static_cast<int>(the.launch().blocks)};
}

const void* check_read(const void* p, int bytes, Site site) {
  return access(p, bytes, Memory::Kind::kRead, site);
}
const void* check_read_constant(const void* p, int bytes, Site site) {
  return access(p, bytes, Memory::Kind::kReadConstant, site);
}
void* check_write(void* p, int bytes, Site site) { return access(p, bytes, Memory::Kind::kWrite, site); }

void* shared_window(int64_t bytes, Site site) {
  if (bytes > the.launch().shared_bytes) {
    fail("shared_memory() of a type of " + std::to_string(bytes) + " bytes, but launched with " +
             std::to_string(the.launch().shared_bytes),
         site);
  }
  return the.self().block->window;
}
uint32_t shared_address(const void* p, Site site) {
  if (!the.memory.in_shared(p)) fail("this is not the address of shared memory", site);
  return static_cast<uint32_t>(static_cast<const char*>(p) - the.self().block->window +
                               the.memory.first_address);
}
const void* shared_pointer(uint32_t address, Site site) {
  return the.memory.shared_pointer(the.self(), address, site);
}

void copy_async(void* to, const void* from, bool valid, Site site) {
  the.last_site = site;
  the.memory.copy_async(the.self(), to, from, valid, site);
}
void copy_async_commit() { ++the.self().groups; }
void copy_async_wait(int pending, Site site) { the.memory.wait_for_copies(the.self(), pending, site); }

void sync_threads(Site site) { the.sync_threads(site); }
void trap(const char* why, Site site) { fail(std::string("trap: ") + why, site); }
void collective(const char* name, void* given, void (*perform)(void* const* given), Site site) {
  the.collective(name, given, perform, site);
}

uint32_t atomic_add(uint32_t* counter, uint32_t value, Site site) {
  const uint32_t before = the.memory.atomic_add(the.self(), counter, value, site);
  the.pause(value == 0);
  return before;
}

void run(const Launch& launch) { the.run(launch); }

void set_seed(uint64_t seed) { the.seed = seed; }
void set_shared_limit(int64_t bytes) { shared_limit = std::min<int64_t>(bytes, kMaxSharedBytes); }
void set_shared_start(int address) { the.memory.first_address = address; }
void set_resident_blocks(int blocks) { the.resident_blocks = std::min(blocks, kMaxResidentBlocks); }

std::map<std::string, BankCount> bank_counts() { return the.memory.bank_counts(); }
void reset_bank_counts() { the.memory.reset_bank_counts(); }

}  // namespace peft_kernels::simt
