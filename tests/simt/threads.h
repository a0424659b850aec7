// The threads, warps and blocks that the emulator runs, and how reports name things.
#pragma once

#include <cxxabi.h>

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "banks.h"
#include "emulator.h"
#include "fiber.h"
#include "shadow.h"

namespace peft_kernels::simt {

inline constexpr int kMaxThreads = 1024;
inline constexpr int kMaxResidentBlocks = 4;

struct Block;
struct Warp;

// An asynchronous copy under way.
struct Copy {
  void* to;
  const void* from;
  char data[16];  // of `from` at the start
  bool valid;
  Site site;
  int group;
};

// Ticks are counted by `clock`; see shadow.h. Only an atomic can have told a thread what other blocks wrote:
// `acquired` is the tick of the last one that this thread did, or that a barrier has told it of.
struct Thread {
  Context context;
  std::unique_ptr<Stack> stack;
  Block* block;
  Warp* warp;
  int index;
  uint32_t lane_bit;
  uint32_t acquired;
  std::vector<Copy> copies;
  int groups;  // of copies, committed
};

struct Warp {
  uint32_t ready, at_collective, at_barrier, exited;  // lanes; one in none of these runs
  const char* collective;                             // where at_collective wait
  Site collective_site;
  void* given[kLanes];
  BankLog log;
  Block* block;
  Thread* threads;
};

struct Block {
  int64_t index = -1;  // none
  char* window;        // its shared memory, as the kernel sees it
  uint32_t epoch, acquired, threads_acquired;
  int waiting, exited;  // threads
  Site barrier_site;
  std::vector<Warp> warps;
  std::vector<Thread> threads;
  std::unique_ptr<Shadow> shadow;
};

// Ends the launch. Not of use outside a fiber.
[[noreturn]] void fail(const std::string& what, Site site);

inline std::string text(Site site) {
  const char* slash = std::strrchr(site.file, '/');
  return std::string(slash != nullptr ? slash + 1 : site.file) + ":" + std::to_string(site.line);
}

inline bool same(Site a, Site b) {
  return a.line == b.line && (a.file == b.file || std::strcmp(a.file, b.file) == 0);
}

inline std::string demangled(const char* name) {
  int status = 0;
  char* readable = abi::__cxa_demangle(name, nullptr, nullptr, &status);
  std::string result = status == 0 ? readable : name;
  std::free(readable);
  for (const std::string noise : {"peft_kernels::cuda::", "(anonymous namespace)::"}) {
    for (size_t at; (at = result.find(noise)) != std::string::npos;) result.erase(at, noise.size());
  }
  return result;
}

inline std::string lane_list(uint32_t lanes) {
  std::string list;
  for (int lane = 0; lane < kLanes; ++lane) {
    if ((lanes >> lane & 1) != 0) list += (list.empty() ? "" : ", ") + std::to_string(lane);
  }
  return ((lanes & (lanes - 1)) == 0 ? "lane " : "lanes ") + list;
}

inline std::string waiting_lanes(const Warp& warp) {
  return lane_list(warp.at_collective) + " of the warp wait at " + warp.collective + " (" +
         text(warp.collective_site) + ")";
}

}  // namespace peft_kernels::simt
