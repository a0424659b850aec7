// Runs a kernel: warps of a few concurrent blocks in turn, the lanes of a warp in lockstep as long as they
// agree.
#pragma once

#include <pthread.h>
#include <setjmp.h>

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "machine.h"
#include "memory.h"
#include "warp.h"

namespace ptx {

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
  bool land_one(size_t chance);
  void explain_wait() const;

  // lockstep.cpp: these return whether the warp can continue.
  bool step(Warp& warp, int steps);
  bool choose(Warp& warp);
  bool branch(Warp& warp, const Instruction& i);
  bool finish(Warp& warp, const Instruction& i);
  bool meet(Warp& warp, const Instruction& i);
  bool reach_barrier(Warp& warp, const Instruction& i);
  bool reach_meeting(Warp& warp, const Instruction& i);
  bool pass(Warp& warp);
  void touch(Warp& warp, const Instruction& i) const;
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

}  // namespace ptx
