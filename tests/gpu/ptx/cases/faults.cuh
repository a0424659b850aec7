// Kernels with a planted fault, and the same kernels without it: each in both forms by kBroken. A comment
// "fault: NAME" marks the line that the report must name.
#pragma once

#include <cstdint>

#include "cases.cuh"

namespace cases {

inline constexpr int kWarp = 32, kCount = 64;  // threads of a warp, of a block
inline constexpr unsigned kAll = ~0u;          // lanes

struct Pointers {
  const float* in = nullptr;
  float* out = nullptr;
  unsigned* counter = nullptr;
};

inline constexpr int kElements = 4096;  // of in and out

inline void run_blocks(void (*kernel)(Pointers), int blocks, int shared_bytes = 4 * kCount) {
  const Array<float> in(std::vector<float>(kElements, 1.0f)), out(kElements);
  const Array<unsigned> counter(1);
  run<Pointers>(kernel, {in.data(), out.data(), counter.data()}, blocks, kCount, shared_bytes);
}

// Two entries of a table of Cases.
#define FAULT(name, ...)                                            \
  {#name "-broken", [] { run_blocks(name<true>, __VA_ARGS__); }}, { \
    #name "-fixed", [] { run_blocks(name<false>, __VA_ARGS__); }    \
  }

}  // namespace cases
