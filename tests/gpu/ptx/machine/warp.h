// The state of warps and blocks.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "../text/instruction.h"
#include "async_block.h"
#include "shared_shadow.h"

namespace ptx {

inline constexpr int kMaxThreads = 1024;
inline constexpr int kMaxResidentBlocks = 4;
inline constexpr uint32_t kAllLanes = ~0u;

struct Block;
class Memory;

// Makes may_alias types, so that registers can be read as any type.
template <class T>
struct Aliasing {
  using type [[gnu::may_alias]] = T;
};

// Diverged lanes of a warp that wait for their turn.
struct Parked {
  enum class Why : uint8_t { kTurn, kYield, kCollective } why;
  uint32_t pc, lanes;
};

// The memory model's state of a thread, in ticks of Memory. `acquired` is the last atomic that acquired
// releases of other blocks; the others are for fences around relaxed atomics.
struct ThreadOrder {
  uint32_t acquired, read, fenced, fence_epoch;
};

// An asynchronous copy in flight.
struct Copy {
  uint32_t to;  // offset in shared memory
  uint8_t bytes, read;
  uint16_t site;
  int group;
  uint32_t number;  // in the block
  const char* from;
  char data[16];  // of `from` when the copy started
};

struct Warp {
  // ---- For handlers -----------------------------------------------------------------------------------
  std::byte* registers;
  const std::byte* constants;  // their end
  uint32_t active;             // lanes executing the instruction
  Block* block;
  Memory* memory;
  int index;  // in the block

  template <class T>
  const typename Aliasing<T>::type* in(int32_t at) const {
    return reinterpret_cast<const typename Aliasing<T>::type*>((at < 0 ? constants : registers) + at);
  }
  template <class T>
  typename Aliasing<T>::type* out(int32_t at) const {
    return reinterpret_cast<typename Aliasing<T>::type*>(registers + at);
  }
  uint32_t predicate(int32_t at) const { return *in<uint32_t>(at); }
  void set_predicate(int32_t at, uint32_t lanes) const {
    auto* const to = out<uint32_t>(at);
    *to = (*to & ~active) | (lanes & active);
  }

  // ---- For the scheduler ------------------------------------------------------------------------------
  uint32_t pc, lanes;  // currently running
  uint32_t join;       // smallest pc of other runnable lanes
  uint32_t at_barrier, exited;
  bool fair;   // yields to other lanes, which may be what it waits for
  bool again;  // set by a handler: the instruction has to wait, and is repeated
  std::vector<Parked> parked;
  Meeting* meeting = nullptr;  // set by the handler of a kMeeting: the one to sleep at

  // ---- For memory -------------------------------------------------------------------------------------
  uint32_t epoch;  // tick of the last bar.warp.sync
  std::array<ThreadOrder, kLanes> order;
  std::array<int, kLanes> groups;  // of copies, committed
  std::array<std::vector<Copy>, kLanes> copies;
};

struct Block {
  int64_t index = -1;  // none
  int slot;
  char* window;                                       // start of the generic addresses of its shared memory
  char* storage;                                      // its actual memory
  uint32_t start, epoch, acquired, threads_acquired;  // ticks: of its start, of its last barrier
  int waiting, exited;                                // threads
  uint32_t barrier_pc;
  std::vector<std::unique_ptr<Warp>> warps;
  std::unique_ptr<SharedShadow> shadow;
  std::unique_ptr<AsyncBlock> async;  // null if the kernel does without
};

// The configuration of the current launch.
struct Grid {
  Entry* entry;
  const std::vector<std::string>* sites;
  std::vector<std::byte> parameters;
  unsigned blocks;  // of all dimensions
  unsigned blocks_x, blocks_y;
  unsigned threads;
  int target;                               // 80 for sm_80
  bool same_writes;                         // Launch::same_writes
  int64_t shared_bytes;                     // static and dynamic
  const std::vector<std::byte>* constants;  // what ld.const reads
};
extern Grid grid;

inline int thread_of(const Warp& warp, int lane) { return warp.index * kLanes + lane; }
// With AsyncBlock alone.
inline Clock& clock_of(const Warp& warp, int lane) {
  return warp.block->async->clocks[static_cast<size_t>(thread_of(warp, lane))];
}
std::string lane_list(uint32_t lanes);
std::string site_text(uint16_t site);

// Abort the launch with a Fault.
[[noreturn]] void fail(const Warp& warp, int lane, uint16_t site, const std::string& what);
[[noreturn]] void fail(const Warp& warp, uint32_t lanes, const Instruction& at, const std::string& what);

// Calls `body` with each lane whose bit is set.
template <class Body>
void for_lanes(uint32_t lanes, const Body& body) {
  if (lanes == kAllLanes) {
    for (int lane = 0; lane < kLanes; ++lane) body(lane);
  } else {
    for (; lanes != 0; lanes &= lanes - 1) body(__builtin_ctz(lanes));
  }
}

// Stores the result of the active lanes; handlers compute all lanes.
template <class T>
void keep(const Warp& warp, int32_t at, const T (&result)[kLanes]) {
  auto* const to = warp.out<T>(at);
  if (warp.active == kAllLanes) {
    for (int lane = 0; lane < kLanes; ++lane) to[lane] = result[lane];
  } else {
    for (int lane = 0; lane < kLanes; ++lane) {
      to[lane] = (warp.active >> lane & 1) != 0 ? result[lane] : to[lane];
    }
  }
}

}  // namespace ptx
