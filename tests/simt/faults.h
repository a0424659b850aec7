// Kernels with a planted fault, and the same kernels without it, for test_emulator.py: each in both forms by
// kBroken. A comment "fault: NAME" marks the line that the report must name.
#pragma once

#include <cstdint>
#include <vector>

#include "cases.h"
#include "launch.cuh"

namespace peft_kernels::cuda {

inline constexpr int kCount = 64;  // threads of a block

struct Pointers {
  const float* in = nullptr;
  float* out = nullptr;
  uint32_t* counter = nullptr;
};

// A kernel of 64 threads around a function of Pointers.
template <void (*kBody)(const Pointers&)>
struct Kernel {
  static constexpr int kThreads = kCount, kBlocksPerSm = 1;
  using Params = Pointers;
  static DEVICE void run(const Params& p) { kBody(p); }
};

template <void (*kBody)(const Pointers&)>
void run_blocks(int blocks, int shared_bytes = 4 * kCount) {
  std::vector<float> in(4096, 1.0f), out(4096);
  uint32_t counter = 0;
  launch<Kernel<kBody>>({in.data(), out.data(), &counter}, blocks, nullptr, shared_bytes);
}

// Two entries of a table of Cases.
#define FAULT(name, ...)                                            \
  {#name "-broken", [] { run_blocks<name<true>>(__VA_ARGS__); }}, { \
    #name "-fixed", [] { run_blocks<name<false>>(__VA_ARGS__); }    \
  }

}  // namespace peft_kernels::cuda
