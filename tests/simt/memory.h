// The checks of every access, and asynchronous copies.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <vector>

#include "emulator.h"
#include "global_shadow.h"
#include "shadow.h"
#include "threads.h"

namespace peft_kernels::simt {

class Memory {
 public:
  // Where shared memory begins for a kernel, as on sm_90: none may count on 0.
  int first_address = 1024;

  enum class Kind { kRead, kReadConstant, kWrite };

  uint32_t tick() const { return tick_; }
  uint32_t advance() { return ++tick_; }

  void start_launch(const Launch& launch);
  void place(Block& block, size_t slot);  // gives it a window
  void start_block(Block& block);
  // A warp's lanes have all come to the same place.
  void count_banks(Warp& warp) { warp.log.count(counts_); }

  // Where the bytes at p really are.
  char* access(Thread& thread, const void* p, int bytes, Kind kind, Site site);
  bool in_shared(const void* p) const {
    const auto* at = static_cast<const char*>(p);
    return at >= windows_ && at < windows_ + kMaxResidentBlocks * kWindowStride;
  }
  char* shared_pointer(const Thread& thread, uint32_t address, Site site) const {
    if (address >= kWindowStride / 2) fail("address " + std::to_string(address) + " is not shared", site);
    return thread.block->window - first_address + address;
  }
  void copy_async(Thread& thread, void* to, const void* from, bool valid, Site site);
  void wait_for_copies(Thread& thread, int pending, Site site);
  uint32_t atomic_add(Thread& thread, uint32_t* counter, uint32_t value, Site site);
  // Something has happened that a thread could wait for.
  void progress() { atomics_since_progress_ = 0; }

  std::map<std::string, BankCount> bank_counts() const;
  void reset_bank_counts() { std::fill(counts_.begin(), counts_.end(), BankCount{}); }

 private:
  // Addresses this near a block's shared memory are taken for an attempt at it.
  static constexpr int64_t kWindowStride = 16 << 20;

  struct SiteSlot {
    Site site{nullptr, 0};
    uint16_t index = 0;
  };

  uint16_t site_index(Site site);
  Access as_access(const Thread& thread, uint16_t site) const {
    return {tick_, thread.block->epoch, site, static_cast<uint16_t>(thread.index)};
  }
  int shared_offset(const Thread& thread, const void* p, int bytes, Site site) const;
  char* real(const void* p) const { return storage_ + (static_cast<const char*>(p) - windows_); }
  void check_race(const Shadow::Conflict& conflict, bool write, Site site) const;
  void access_global(Thread& thread, const void* p, int bytes, Kind kind, Site site);

  const Launch* launch_ = nullptr;
  // Kernels get addresses in `windows_`, where nothing can be accessed, so that a plain pointer to shared
  // memory, which no check sees, is a fault.
  char* windows_ = nullptr;
  char* storage_ = nullptr;
  uint32_t tick_ = 1;
  GlobalShadow global_;
  int64_t atomics_since_progress_ = 0;
  std::vector<Site> sites_;
  std::vector<BankCount> counts_;  // by site
  SiteSlot recent_sites_[1024];
};

inline void Memory::start_launch(const Launch& launch) {
  launch_ = &launch;
  progress();
  global_.start_launch(advance(), launch.blocks);
  if (windows_ != nullptr) return;
  const auto reserve = [](int protection) {
    void* start = mmap(nullptr, kMaxResidentBlocks * kWindowStride, protection,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) throw std::bad_alloc();
    return static_cast<char*>(start);
  };
  windows_ = reserve(PROT_NONE);
  storage_ = reserve(PROT_READ | PROT_WRITE);
}

inline void Memory::place(Block& block, size_t slot) {
  block.window = windows_ + static_cast<int64_t>(slot) * kWindowStride + kWindowStride / 2;
  block.shadow = std::make_unique<Shadow>(kMaxSharedBytes);
}

inline void Memory::start_block(Block& block) {
  std::memset(real(block.window), 0xff, static_cast<size_t>(launch_->shared_bytes));  // NaN in all types
  block.epoch = advance();
  block.acquired = block.threads_acquired = 0;
  bool copies_left = false;
  for (Thread& thread : block.threads) {
    copies_left = copies_left || !thread.copies.empty();
    thread.copies.clear();
    thread.groups = 0;
    thread.acquired = 0;
  }
  if (copies_left) block.shadow->clear_under_way();
  for (Warp& warp : block.warps) warp.log.clear();
}

inline uint16_t Memory::site_index(Site site) {
  const auto key = reinterpret_cast<uintptr_t>(site.file) / 8 ^ static_cast<unsigned>(site.line) * 7u;
  SiteSlot& slot = recent_sites_[key % 1024];
  if (slot.site.file != site.file || slot.site.line != site.line) {
    const auto known = [&](Site each) { return same(each, site); };
    const auto found = std::find_if(sites_.begin(), sites_.end(), known);
    slot = {site, static_cast<uint16_t>(found - sites_.begin())};
    if (found == sites_.end()) {
      sites_.push_back(site);
      counts_.push_back({});
    }
  }
  return slot.index;
}

inline int Memory::shared_offset(const Thread& thread, const void* p, int bytes, Site site) const {
  const int64_t offset = static_cast<const char*>(p) - thread.block->window;
  if (offset < 0 || offset + bytes > launch_->shared_bytes) {
    fail(std::to_string(bytes) + " bytes at byte " + std::to_string(offset) +
             " of shared memory, which has " + std::to_string(launch_->shared_bytes),
         site);
  }
  return static_cast<int>(offset);
}

inline void Memory::check_race(const Shadow::Conflict& conflict, bool write, Site site) const {
  if (conflict.byte < 0) return;
  const Shadow::Cell cell = conflict.cell;
  std::string who = "thread " + std::to_string(cell.who());
  if (cell.who() == Shadow::kReaders) {
    who = "other threads";
  }
  const std::string line = " (" + text(sites_[cell.site()]) + ")";
  const std::string mine =
      (write ? "writes byte " : "reads byte ") + std::to_string(conflict.byte) + " of shared memory";
  if (cell.tick() == Shadow::kUnderWay) {
    fail(mine + ", where an asynchronous copy by " + who + line + " is under way", site);
  }
  fail("race: " + mine + ", which " + who + (conflict.with_read ? " read" : " wrote") + line +
           " with no barrier between",
       site);
}

inline char* Memory::access(Thread& thread, const void* p, int bytes, Kind kind, Site site) {
  const bool write = kind == Kind::kWrite;
  if (reinterpret_cast<uintptr_t>(p) % static_cast<unsigned>(bytes) != 0) {
    char address[32];
    std::snprintf(address, sizeof(address), "%p", p);
    fail("misaligned " + std::string(write ? "store" : "load") + " of " + std::to_string(bytes) +
             " bytes at " + address,
         site);
  }
  if (!in_shared(p)) {
    access_global(thread, p, bytes, kind, site);
    return static_cast<char*>(const_cast<void*>(p));
  }
  if (kind == Kind::kReadConstant) fail("load_constant of shared memory", site);
  const int offset = shared_offset(thread, p, bytes, site);
  const Access access = as_access(thread, site_index(site));
  Shadow& shadow = *thread.block->shadow;
  check_race(write ? shadow.write(offset, bytes, access) : shadow.read(offset, bytes, access), write, site);
  thread.warp->log.add(thread.index % kLanes, offset, bytes, access.site);
  return real(p);
}

inline void Memory::access_global(Thread& thread, const void* p, int bytes, Kind kind, Site site) {
  if (p == nullptr) fail("null pointer", site);
  const bool write = kind == Kind::kWrite, constant = kind == Kind::kReadConstant;
  const uint16_t index = site_index(site);
  const auto [other, with_read] = write ? global_.write(p, bytes, thread, tick_, index)
                                        : global_.read(p, bytes, thread, tick_, index, constant);
  if (other != nullptr) {
    fail(std::string("race: ") + (write ? "writes" : "reads") + " global memory that thread " +
             std::to_string(other->thread) + " of block " + std::to_string(other->block) +
             (with_read ? " read (" : " wrote (") + text(sites_[other->site]) + ")" +
             (constant ? ", as constant" : " with nothing to order them"),
         site);
  }
  if (write) progress();
}

inline void Memory::copy_async(Thread& thread, void* to, const void* from, bool valid, Site site) {
  if (!in_shared(to)) fail("copy_async_16 to what is not shared memory", site);
  if (valid && in_shared(from)) fail("copy_async_16 from shared memory", site);
  access(thread, to, 16, Kind::kWrite, site);
  Copy copy{to, from, {}, valid, site, thread.groups};
  if (valid) std::memcpy(copy.data, access(thread, from, 16, Kind::kRead, site), 16);
  // It may land at once, or as late as the wait: until then, nobody can count on what is there.
  const Access now = as_access(thread, site_index(site));
  thread.block->shadow->write(shared_offset(thread, to, 16, site), 16, now, true);
  thread.copies.push_back(copy);
}

inline void Memory::wait_for_copies(Thread& thread, int pending, Site site) {
  size_t landed = 0;
  while (landed < thread.copies.size() && thread.copies[landed].group < thread.groups - pending) {
    const Copy& copy = thread.copies[landed++];
    if (copy.valid && std::memcmp(copy.data, copy.from, 16) != 0) {
      fail("the source of an asynchronous copy changed before its wait (" + text(site) + ")", copy.site);
    }
    std::memcpy(real(copy.to), copy.data, 16);
    thread.block->shadow->written(shared_offset(thread, copy.to, 16, site), 16,
                                  as_access(thread, site_index(copy.site)));
  }
  thread.copies.erase(thread.copies.begin(), thread.copies.begin() + static_cast<int64_t>(landed));
}

inline uint32_t Memory::atomic_add(Thread& thread, uint32_t* counter, uint32_t value, Site site) {
  if (in_shared(counter)) fail("atomic_add_ordered in shared memory", site);
  access(thread, counter, 4, Kind::kRead, site);
  constexpr int64_t kPatience = 1000000;
  if (++atomics_since_progress_ > kPatience) {
    fail("deadlock: waits for a counter, and nothing else has happened for a million atomics", site);
  }
  const uint32_t tick = advance();
  thread.acquired = thread.block->threads_acquired = tick;
  global_.release(thread, tick);
  const uint32_t before = *counter;
  *counter = before + value;
  return before;
}

inline std::map<std::string, BankCount> Memory::bank_counts() const {
  std::map<std::string, BankCount> result;
  for (size_t i = 0; i < counts_.size(); ++i) {
    if (counts_[i].accesses != 0) result[text(sites_[i])] = counts_[i];
  }
  return result;
}

}  // namespace peft_kernels::simt
