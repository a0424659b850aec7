#include "emulator.h"

#include <cxxabi.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <numeric>
#include <stdexcept>

#include "banks.h"
#include "fiber.h"
#include "shadow.h"

namespace peft_kernels::simt {
namespace {

// Shared memory begins here in its window, as on sm_90: no kernel may count on 0.
constexpr int kFirstAddress = 1024;
constexpr int kMaxResidentBlocks = 4;
// Addresses this near a block's shared memory are taken for an attempt at it.
constexpr int64_t kWindowStride = 16 << 20;
constexpr int kMaxThreads = 1024;

struct Warp;
struct Block;

struct Copy {
  char* to;
  const void* from;
  char data[16];  // of `from` at the start
  bool valid;
  uint16_t site;
  int group;
};

struct Thread {
  Context context;
  std::unique_ptr<Stack> stack;
  Block* block;
  Warp* warp;
  int index;
  uint32_t lane_bit;
  std::vector<Copy> copies;  // under way
  int groups;                // committed
};

// A lane is running, or in one of these sets.
struct Warp {
  uint32_t ready, at_collective, at_barrier, exited;
  uint32_t epoch;
  const char* collective;
  Site collective_site;
  void* given[kLanes];
  BankLog log;
  Block* block;
  Thread* threads;
};

struct Block {
  int64_t index = -1;  // none
  char* window;
  uint32_t epoch;
  int waiting, exited;
  Site barrier_site;
  std::vector<Warp> warps;
  std::vector<Thread> threads;
  std::unique_ptr<Shadow> shadow;
};

class Emulator {
 public:
  void run(const Launch& launch);

  Thread& self() { return *current_; }
  [[noreturn]] void fail(const std::string& what, Site site);
  void access(const void* p, int bytes, bool write, Site site);
  void copy(void* to, const void* from, bool valid, Site site);
  void wait_for_copies(int pending, Site site);
  void sync_threads(Site site);
  void collective(const char* name, void* given, void (*perform)(void* const*), Site site);
  void order_warp() { self().warp->epoch = ++tick_; }
  void pause(bool poll);
  [[noreturn]] void exit_thread();

  bool in_shared(const void* p) const {
    return static_cast<const char*>(p) >= windows_ &&
           static_cast<const char*>(p) < windows_ + kMaxResidentBlocks * kWindowStride;
  }
  int64_t shared_offset(const void* p) { return static_cast<const char*>(p) - self().block->window; }

  const Launch* launch_ = nullptr;
  uint64_t seed_ = 0;
  int resident_ = 0;  // 0: as the seed says
  std::mutex mutex_;
  std::vector<BankCount> counts_;
  std::vector<Site> sites_;
  int64_t atomics_since_progress_ = 0;

 private:
  uint32_t random() {
    random_ ^= random_ << 13;
    random_ ^= random_ >> 7;
    random_ ^= random_ << 17;
    return static_cast<uint32_t>(random_ >> 16);
  }
  uint16_t site_index(Site site);
  Access as_access(Site site);
  void check_race(const Shadow::Conflict& conflict, bool write, Site site);
  void start_block(Block& block, int64_t index);
  Thread* next_lane();
  void switch_to(Thread* thread);
  void reschedule();
  std::string describe_stop();

  Thread* current_ = nullptr;
  Context main_;
  Warp* warp_ = nullptr;  // the one whose lanes run
  std::vector<Warp*> warps_;
  std::deque<Block> blocks_;
  int64_t blocks_left_ = 0;
  char* windows_ = nullptr;
  uint32_t tick_ = 1;
  uint64_t random_ = 1;
  std::string error_;
  struct SiteSlot {
    Site site{nullptr, 0};
    uint16_t index = 0;
  };
  SiteSlot site_cache_[1024];
};

Emulator& emulator() {
  static auto* const instance = new Emulator;
  return *instance;
}
// Without the guard of a function's static, in what every access calls.
Emulator& the = emulator();

std::string text(Site site) {
  const char* slash = std::strrchr(site.file, '/');
  return std::string(slash ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

bool same(Site a, Site b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

std::string demangled(const char* name) {
  int status = 0;
  char* readable = abi::__cxa_demangle(name, nullptr, nullptr, &status);
  std::string result = status == 0 ? readable : name;
  std::free(readable);
  return result;
}

std::string lane_list(uint32_t lanes) {
  std::string list;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (lanes >> lane & 1) list += (list.empty() ? "" : ", ") + std::to_string(lane);
  }
  return (__builtin_popcount(lanes) == 1 ? "lane " : "lanes ") + list;
}

void fiber_main() {
  arrived(the.self().context);
  the.launch_->entry(the.launch_->params);
  the.exit_thread();
}

// ---- Scheduling
// --------------------------------------------------------------------------------------------

Thread* Emulator::next_lane() {
  // Another warp now and then; else this one as long as it can run.
  if (warp_ == nullptr || warp_->ready == 0 || (random() & 63) == 0) {
    const size_t first = random() % warps_.size();
    Warp* found = nullptr;
    for (size_t i = 0; i < warps_.size() && found == nullptr; ++i) {
      Warp* warp = warps_[(first + i) % warps_.size()];
      if (warp->ready != 0) found = warp;
    }
    if (found == nullptr) return nullptr;
    warp_ = found;
  }
  const uint32_t turn = random() % kLanes;
  const uint32_t turned = warp_->ready >> turn | (turn == 0 ? 0 : warp_->ready << (kLanes - turn));
  return &warp_->threads[(__builtin_ctz(turned) + turn) % kLanes];
}

void Emulator::switch_to(Thread* thread) {
  Thread* previous = current_;
  thread->warp->ready &= ~thread->lane_bit;
  current_ = thread;
  if (thread != previous) switch_context(previous->context, thread->context);
}

void Emulator::reschedule() {
  Thread* next = next_lane();
  if (next == nullptr) fail("all threads wait: " + describe_stop(), {"", 0});
  switch_to(next);
}

std::string Emulator::describe_stop() {
  std::string what;
  for (const Block& block : blocks_) {
    if (block.index >= 0) {
      what += "block " + std::to_string(block.index) + ": " + std::to_string(block.waiting) +
              " threads at sync_threads, " + std::to_string(block.exited) + " returned; ";
    }
  }
  return what;
}

void Emulator::fail(const std::string& what, Site site) {
  const Thread& thread = self();
  error_ = demangled(launch_->kernel) + ", block " + std::to_string(thread.block->index) + ", thread " +
           std::to_string(thread.index) + ", " + text(site) + ": " + what + " (seed " +
           std::to_string(seed_) + ")";
  switch_context(current_->context, main_);
  std::abort();
}

void Emulator::pause(bool poll) {
  if (!poll && (random() & 1) != 0) return;
  self().warp->ready |= self().lane_bit;
  warp_ = nullptr;
  reschedule();
}

void Emulator::exit_thread() {
  Thread& thread = self();
  Warp& warp = *thread.warp;
  Block& block = *thread.block;
  warp.exited |= thread.lane_bit;
  ++block.exited;
  atomics_since_progress_ = 0;
  if (warp.at_collective != 0) {
    fail("returned, but " + lane_list(warp.at_collective) + " of its warp wait at " + warp.collective + " (" +
             text(warp.collective_site) + ")",
         warp.collective_site);
  }
  if (block.waiting != 0) {
    fail("returned, but " + std::to_string(block.waiting) + " threads wait at sync_threads (" +
             text(block.barrier_site) + ")",
         block.barrier_site);
  }
  if (warp.exited == ~0u) warp.log.count(counts_);
  Thread* next = block.exited == launch_->threads ? nullptr : next_lane();
  if (next == nullptr) {
    switch_context(thread.context, main_);
  } else {
    switch_to(next);
  }
  std::abort();
}

void Emulator::collective(const char* name, void* given, void (*perform)(void* const*), Site site) {
  Thread& thread = self();
  Warp& warp = *thread.warp;
  if (warp.exited != 0) fail(std::string(name) + ": " + lane_list(warp.exited) + " returned", site);
  if (warp.at_barrier != 0) {
    fail(std::string(name) + ": " + lane_list(warp.at_barrier) + " wait at sync_threads (" +
             text(thread.block->barrier_site) + ")",
         site);
  }
  if (warp.at_collective == 0) {
    warp.collective = name;
    warp.collective_site = site;
  } else if (!same(site, warp.collective_site) || std::strcmp(name, warp.collective) != 0) {
    fail(std::string(name) + ": " + lane_list(warp.at_collective) + " wait at " + warp.collective + " (" +
             text(warp.collective_site) + ")",
         site);
  }
  warp.at_collective |= thread.lane_bit;
  warp.given[thread.index % kLanes] = given;
  if (warp.at_collective == ~0u) {
    warp.at_collective = 0;
    perform(warp.given);
    warp.log.count(counts_);
    warp.ready = ~0u;
  }
  reschedule();
}

void Emulator::sync_threads(Site site) {
  Thread& thread = self();
  Warp& warp = *thread.warp;
  Block& block = *thread.block;
  if (block.exited != 0) {
    fail("sync_threads: " + std::to_string(block.exited) + " threads of the block returned", site);
  }
  if (warp.at_collective != 0) {
    fail("sync_threads: " + lane_list(warp.at_collective) + " wait at " + warp.collective + " (" +
             text(warp.collective_site) + ")",
         site);
  }
  if (block.waiting == 0) {
    block.barrier_site = site;
  } else if (!same(site, block.barrier_site)) {
    fail("sync_threads: " + std::to_string(block.waiting) + " threads wait at another one (" +
             text(block.barrier_site) + ")",
         site);
  }
  warp.at_barrier |= thread.lane_bit;
  if (++block.waiting == launch_->threads) {
    block.waiting = 0;
    block.epoch = ++tick_;
    for (Warp& each : block.warps) {
      each.epoch = tick_;
      each.at_barrier = 0;
      each.ready = ~0u;
      each.log.count(counts_);
    }
    warp_ = nullptr;
  }
  reschedule();
}

// ---- Memory
// ------------------------------------------------------------------------------------------------

uint16_t Emulator::site_index(Site site) {
  SiteSlot& slot =
      site_cache_[(reinterpret_cast<uintptr_t>(site.file) ^ static_cast<unsigned>(site.line) * 7u) % 1024];
  if (slot.site.file != site.file || slot.site.line != site.line) {
    const auto found =
        std::find_if(sites_.begin(), sites_.end(), [&](Site known) { return same(known, site); });
    slot = {site, static_cast<uint16_t>(found - sites_.begin())};
    if (found == sites_.end()) {
      sites_.push_back(site);
      counts_.push_back({});
    }
  }
  return slot.index;
}

Access Emulator::as_access(Site site) {
  const Thread& thread = self();
  return {tick_, thread.block->epoch, thread.warp->epoch, site_index(site),
          static_cast<uint16_t>(thread.index)};
}

void Emulator::check_race(const Shadow::Conflict& conflict, bool write, Site site) {
  if (conflict.byte < 0) return;
  const Shadow::Cell cell = conflict.cell;
  std::string who = "thread " + std::to_string(cell.who());
  if (cell.who() == Shadow::kReaders) {
    who = "other threads";
  } else if (cell.who() >= Shadow::kWarpReaders) {
    who = "threads of warp " + std::to_string(cell.who() - Shadow::kWarpReaders);
  }
  const std::string line = "(" + text(sites_[cell.site()]) + ")";
  const std::string mine = std::string(write ? "writes" : "reads") + " byte " +
                           std::to_string(conflict.byte) + " of shared memory";
  if (cell.tick() == Shadow::kUnderWay) {
    fail(mine + ", where an asynchronous copy by " + who + " is under way " + line, site);
  }
  fail("race: " + mine + ", which " + who + (conflict.with_read ? " read " : " wrote ") + line +
           " with no barrier between",
       site);
}

void Emulator::access(const void* p, int bytes, bool write, Site site) {
  if (reinterpret_cast<uintptr_t>(p) % static_cast<unsigned>(bytes) != 0) {
    char address[32];
    std::snprintf(address, sizeof(address), "%p", p);
    fail("misaligned " + std::string(write ? "store" : "load") + " of " + std::to_string(bytes) +
             " bytes at " + address,
         site);
  }
  if (in_shared(p)) {
    const int64_t offset = shared_offset(p);
    if (offset < 0 || offset + bytes > launch_->shared_bytes) {
      fail(std::string(write ? "store" : "load") + " of " + std::to_string(bytes) + " bytes at byte " +
               std::to_string(offset) + " of shared memory, out of its " +
               std::to_string(launch_->shared_bytes),
           site);
    }
    Thread& thread = self();
    const Access access = as_access(site);
    Shadow& shadow = *thread.block->shadow;
    const int at = static_cast<int>(offset);
    check_race(write ? shadow.write(at, bytes, access) : shadow.read(at, bytes, access), write, site);
    thread.warp->log.add(thread.index % kLanes, at, bytes, access.site);
  } else {
    if (p == nullptr) fail("null pointer", site);
    if (write) atomics_since_progress_ = 0;
  }
}

void Emulator::copy(void* to, const void* from, bool valid, Site site) {
  if (!in_shared(to)) fail("copy_async_16 to where no shared memory is", site);
  access(to, 16, true, site);
  Copy copy{static_cast<char*>(to), from, {}, valid, site_index(site), self().groups};
  if (valid) {
    if (in_shared(from)) fail("copy_async_16 from shared memory", site);
    access(from, 16, false, site);
    std::memcpy(copy.data, from, 16);
  }
  self().block->shadow->write(static_cast<int>(shared_offset(to)), 16, as_access(site), true);
  std::memset(to, 0xff, 16);
  self().copies.push_back(copy);
}

void Emulator::wait_for_copies(int pending, Site site) {
  Thread& thread = self();
  size_t landed = 0;
  while (landed < thread.copies.size() && thread.copies[landed].group < thread.groups - pending) {
    const Copy& copy = thread.copies[landed++];
    if (copy.valid && std::memcmp(copy.data, copy.from, 16) != 0) {
      fail("the source of an asynchronous copy changed under way", sites_[copy.site]);
    }
    std::memcpy(copy.to, copy.data, 16);
    thread.block->shadow->written(static_cast<int>(shared_offset(copy.to)), 16, as_access(site));
  }
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + static_cast<int64_t>(landed));
}

// ---- Launches
// ----------------------------------------------------------------------------------------------

void Emulator::start_block(Block& block, int64_t index) {
  block.index = index;
  block.epoch = ++tick_;
  block.waiting = block.exited = 0;
  std::memset(block.window, 0xff, static_cast<size_t>(launch_->shared_bytes));  // NaN in all types
  block.warps.resize(static_cast<size_t>(launch_->threads / kLanes));
  if (block.threads.empty()) block.threads.resize(kMaxThreads);
  for (size_t w = 0; w < block.warps.size(); ++w) {
    Warp& warp = block.warps[w];
    warp.ready = ~0u;
    warp.at_collective = warp.at_barrier = warp.exited = 0;
    warp.epoch = block.epoch;
    warp.log.clear();
    warp.block = &block;
    warp.threads = &block.threads[w * kLanes];
  }
  bool copies_left = false;
  for (int i = 0; i < launch_->threads; ++i) {
    Thread& thread = block.threads[static_cast<size_t>(i)];
    if (thread.stack == nullptr) thread.stack = std::make_unique<Stack>();
    thread.stack->prepare(thread.context, fiber_main, i);
    thread.block = &block;
    thread.warp = &block.warps[static_cast<size_t>(i / kLanes)];
    thread.index = i;
    thread.lane_bit = 1u << i % kLanes;
    thread.groups = 0;
  }
  for (Thread& thread : block.threads) {
    copies_left = copies_left || !thread.copies.empty();
    thread.copies.clear();
  }
  if (copies_left) block.shadow->clear_under_way();
}

void Emulator::run(const Launch& launch) {
  const std::lock_guard<std::mutex> lock(mutex_);
  launch_ = &launch;
  error_.clear();
  atomics_since_progress_ = 0;
  random_ = (seed_ + 1) * 0x9e3779b97f4a7c15u;
  for (int i = 0; i < 4; ++i) random();
  if (windows_ == nullptr) {
    void* start = mmap(nullptr, kMaxResidentBlocks * kWindowStride, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) throw std::bad_alloc();
    windows_ = static_cast<char*>(start);
  }
  const auto resident = static_cast<size_t>(
      std::min<int64_t>(resident_ > 0 ? resident_ : 2 + static_cast<int>(random() % 2), launch.blocks));
  while (blocks_.size() < resident) {
    Block& block = blocks_.emplace_back();
    block.window = windows_ + static_cast<int64_t>(blocks_.size() - 1) * kWindowStride + kWindowStride / 2 +
                   kFirstAddress;
    block.shadow = std::make_unique<Shadow>(kMaxSharedBytes);
  }
  std::vector<int64_t> order(static_cast<size_t>(launch.blocks));
  std::iota(order.begin(), order.end(), int64_t{0});
  for (size_t i = order.size(); i > 1; --i) std::swap(order[i - 1], order[random() % i]);

  for (Block& block : blocks_) block.index = -1;
  warp_ = nullptr;
  size_t started = 0, running = 0;
  while (true) {
    warps_.clear();
    running = 0;
    for (size_t i = 0; i < resident; ++i) {
      Block& block = blocks_[i];
      const bool idle = block.index < 0 || block.exited == launch.threads;
      if (idle && started < order.size()) {
        start_block(block, order[started++]);
      } else if (idle) {
        block.index = -1;
        continue;
      }
      ++running;
      for (Warp& warp : block.warps) warps_.push_back(&warp);
    }
    if (running == 0) break;
    warp_ = nullptr;
    Thread* next = next_lane();
    if (next == nullptr) {
      throw std::runtime_error(demangled(launch.kernel) + ": all threads wait: " + describe_stop());
    }
    next->warp->ready &= ~next->lane_bit;
    current_ = next;
    switch_context(main_, next->context);
    current_ = nullptr;
    if (!error_.empty()) throw std::runtime_error(error_);
  }
}

const bool seeded = [] {
  const char* seed = std::getenv("PEFT_KERNELS_SIMT_SEED");
  if (seed != nullptr) the.seed_ = std::strtoull(seed, nullptr, 10);
  return true;
}();

}  // namespace

Position position() {
  const Thread& thread = the.self();
  return {thread.index, static_cast<int>(thread.block->index), static_cast<int>(the.launch_->blocks)};
}

void check_read(const void* p, int bytes, Site site) { the.access(p, bytes, false, site); }
void check_read_constant(const void* p, int bytes, Site site) {
  if (the.in_shared(p)) the.fail("load_constant from shared memory", site);
  the.access(p, bytes, false, site);
}
void check_write(const void* p, int bytes, Site site) { the.access(p, bytes, true, site); }
void check_shared(const void* p, Site site) {
  if (!the.in_shared(p)) the.fail("a shared address is needed, and this is none", site);
}

char* shared_window(int64_t bytes, Site site) {
  if (bytes > the.launch_->shared_bytes) {
    the.fail("shared_memory<T>() of " + std::to_string(bytes) + " bytes, launched with " +
                 std::to_string(the.launch_->shared_bytes),
             site);
  }
  return the.self().block->window;
}
uint32_t shared_address(const void* p, Site site) {
  check_shared(p, site);
  return static_cast<uint32_t>(the.shared_offset(p) + kFirstAddress);
}
const void* shared_pointer(uint32_t address, Site site) {
  if (address > kWindowStride / 2) the.fail("address " + std::to_string(address) + " is not shared", site);
  return the.self().block->window - kFirstAddress + address;
}

void copy_async(void* to, const void* from, bool valid, Site site) { the.copy(to, from, valid, site); }
void copy_async_commit() { ++the.self().groups; }
void copy_async_wait(int pending, Site site) { the.wait_for_copies(pending, site); }

void sync_threads(Site site) { the.sync_threads(site); }
void collective(const char* name, void* given, void (*perform)(void* const* given), Site site) {
  the.collective(name, given, perform, site);
}
void order_warp() { the.order_warp(); }

uint32_t atomic_add(uint32_t* counter, uint32_t value, Site site) {
  if (the.in_shared(counter)) the.fail("atomic_add_ordered in shared memory", site);
  the.access(counter, 4, false, site);
  if (++the.atomics_since_progress_ > 1000000) {
    the.fail("deadlock: a million times a counter was asked, and nothing else happened", site);
  }
  const uint32_t before = *counter;
  *counter += value;
  the.pause(value == 0);
  return before;
}

void run(const Launch& launch) { the.run(launch); }

void set_seed(uint64_t seed) { the.seed_ = seed; }
void set_resident_blocks(int blocks) { the.resident_ = std::min(blocks, kMaxResidentBlocks); }

std::map<std::string, BankCount> bank_counts() {
  std::map<std::string, BankCount> result;
  for (size_t i = 0; i < the.counts_.size(); ++i) {
    if (the.counts_[i].accesses != 0) result[text(the.sites_[i])] = the.counts_[i];
  }
  return result;
}
void reset_bank_counts() { std::fill(the.counts_.begin(), the.counts_.end(), BankCount{}); }

}  // namespace peft_kernels::simt
