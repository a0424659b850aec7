// Checks every access and returns the addresses of its bytes.
#pragma once

#include <cstdint>
#include <string>

#include "../text/instruction.h"
#include "banks.h"
#include "global_shadow.h"
#include "warp.h"

namespace ptx {

class Memory {
 public:
  static constexpr int64_t kMaxSharedBytes = 227 << 10;  // of a block on any card

  uint32_t tick() const { return tick_; }
  uint32_t advance() { return ++tick_; }

  void start_launch();
  void place(Block& block, int slot);  // assigns shared memory
  void start_block(Block& block);

  // Checks accesses of the active lanes, `bytes` each, records them in the race detectors, and fills in the
  // host addresses.
  void find_global(Warp& warp, const uint64_t (&addresses)[kLanes], int bytes, Access access,
                   const Instruction& at, char* (&places)[kLanes]);
  // `values`: what is written, if several threads may write the same; it is in memory afterwards.
  using Values = char[kLanes][32];
  void find_shared(Warp& warp, const uint64_t (&addresses)[kLanes], int bytes, Access access,
                   const Instruction& at, char* (&places)[kLanes], const Values* values = nullptr);
  void find_generic(Warp& warp, const uint64_t (&addresses)[kLanes], int bytes, Access access,
                    const Instruction& at, char* (&places)[kLanes]);

  uint64_t to_shared(const Warp& warp, int lane, uint64_t generic, const Instruction& at) const;
  uint64_t from_shared(const Warp& warp, int lane, uint64_t address, const Instruction& at) const;

  // copies.cpp
  void copy_async(Warp& warp, const uint64_t (&to)[kLanes], const uint64_t (&from)[kLanes],
                  const uint32_t (&read)[kLanes], int bytes, const Instruction& at);
  void wait_for_copies(Warp& warp, int lane, int pending, const Instruction& at);

  // mbarriers.cpp
  void sync_lanes(Warp& warp);                          // orders accesses of the active lanes
  void release_to(Clock& clock, Warp& warp, int lane);  // what the lane has done is now known to `clock`
  Mbarrier& mbarrier_of(Warp& warp, int lane, uint64_t address, const Instruction& at);
  void make_mbarrier(Warp& warp, int lane, uint64_t address, uint32_t count, const Instruction& at);
  void arrive(Warp& warp, int lane, Mbarrier& barrier, uint32_t count, const Instruction& at);
  void expect_bytes(const Warp& warp, int lane, Mbarrier& barrier, int64_t bytes, const Instruction& at);
  void arrive_after_copies(Warp& warp, int lane, uint64_t address, bool is_counted, const Instruction& at);
  uint32_t shared_place(const Warp& warp, int lane, uint64_t address, int64_t bytes,
                        const Instruction& at) const {
    return shared_offset(warp, lane, address, bytes, at);
  }

  // bulk_copies.cpp
  void copy_bulk(Warp& warp, int lane, const struct BulkCopy& copy, const Instruction& at);

  // wgmma.cpp: the warpgroup reads 16 bytes of shared memory.
  void read_by_unit(const Warp& warp, const Clock& clock, uint32_t offset, int warpgroup,
                    const Instruction& at);

  // ordering.cpp: the effect of atomics and fences on the order of a thread's accesses. Each atomic has its
  // own tick.
  void release(Warp& warp, int lane, bool relaxed);
  void acquire(Warp& warp, int lane, bool relaxed);
  void fence(Warp& warp, int lane);
  void count_atomic(const Warp& warp, const Instruction& at);
  // `what`: returns what the lane waits for.
  template <class What>
  void count_poll(const Warp& warp, int lane, const What& what, const Instruction& at) {
    constexpr int64_t kPatience = 100000;
    if (++atomics_since_progress_ > kPatience) fail(warp, lane, at.site, "deadlock: waits for " + what());
  }

  // Resets the deadlock detector: something happened that a thread could be waiting for.
  void progress() { atomics_since_progress_ = instructions_since_progress = 0; }

  int64_t instructions_since_progress = 0;
  BankCounter banks;

  // The current access, for the report if it faults.
  struct Now {
    const Warp* warp = nullptr;
    const Instruction* at = nullptr;
    const uint64_t* addresses = nullptr;
    int bytes = 0;
  };
  Now now;

 private:
  // Generic addresses within this distance of a block's shared memory count as attempts to access it.
  static constexpr int64_t kWindowStride = 16 << 20;

  bool in_windows(uint64_t address) const {
    return address - reinterpret_cast<uint64_t>(windows_) < uint64_t{kMaxResidentBlocks * kWindowStride};
  }
  // By default kernels may read unwritten memory, as long as they do not use it.
  SharedAccess as_access(const Warp& warp, int lane, uint16_t site) const {
    const uint32_t start = options().report_unwritten ? warp.block->start : 0;
    SharedAccess access{tick_,      start, warp.block->epoch,
                        warp.epoch, site,  static_cast<uint16_t>(thread_of(warp, lane))};
    set_clock(access, warp, lane);
    return access;
  }
  static void set_clock(SharedAccess& access, const Warp& warp, int lane) {
    if (warp.block->async == nullptr) return;
    access.clock = &clock_of(warp, lane);
    access.began = warp.block->start;
  }
  void land(Warp& warp, int lane, const Copy& copy, uint16_t actor, uint16_t waiting_site);
  void check_aligned(const Warp& warp, const uint64_t (&addresses)[kLanes], int bytes, bool writes,
                     const Instruction& at) const;
  uint32_t shared_offset(const Warp& warp, int lane, uint64_t address, int64_t bytes,
                         const Instruction& at) const;
  void check(const SharedShadow::Conflict& conflict, const Warp& warp, int lane, bool writes,
             const Instruction& at) const;

  char* windows_ = nullptr;
  char* storage_ = nullptr;
  uint32_t tick_ = 1;
  GlobalShadow global_;
  int64_t atomics_since_progress_ = 0;
};

}  // namespace ptx
