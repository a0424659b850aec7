// Shared by the kernels over an optimizer's parameters: dividing moment blocks among thread blocks, and
// moving elements.
#pragma once

#include "../../common/dynamic_map.h"
#include "../core/device.cuh"
#include "adamw.h"

namespace peft_kernels::cuda {

inline constexpr int kStepThreads = 320, kStepWarps = kStepThreads / kWarp;

// Eight elements of a lane: four from `first` on, and four 128 elements later.
inline constexpr int kRuns = 2, kRun = 4, kRunStride = kWarp * kRun, kMine = kRuns * kRun;
static_assert(kRuns * kRunStride == kStateBlock);
struct Place {
  int64_t first;
  int left;    // elements of the parameter from there on, at most a block
  bool whole;  // the warp has a full block and uses vectors
  DEVICE int count(int run) const {
    const int n = left - run * kRunStride;
    return n < 0 ? 0 : n < kRun ? n : kRun;
  }
};

using Raw = Vec<Words4, kRuns>;
// The integer type that holds a float type's bits.
template <class T>
using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint16_t>;

// Pointers loaded from a table could be in any address space.
template <class T>
DEVICE T* assume_global(T* p) {
  __builtin_assume(__isGlobal(p));
  return p;
}

// kWhole: Place::whole.
template <class T, bool kWhole>
DEVICE void load_runs(const void* from, const Place& at, Raw& raw) {
  constexpr int kWords = sizeof(T) * kRun / 4, kShift = 8 * sizeof(T), kInWord = 4 / sizeof(T);
  const T* p = assume_global(static_cast<const T*>(from) + at.first);
#pragma unroll
  for (int run = 0; run < kRuns; ++run, p += kRunStride) {
    Words4& words = raw.v[run];
    if constexpr (kWhole) {
      const auto found = load(reinterpret_cast<const Vec<uint32_t, kWords>*>(p));
#pragma unroll
      for (int i = 0; i < kWords; ++i) words.v[i] = found.v[i];
    } else {
#pragma unroll
      for (int i = 0; i < kWords; ++i) words.v[i] = 0;
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        if (i < at.count(run))
          words.v[i / kInWord] |= static_cast<uint32_t>(load(p + i)) << (i % kInWord * kShift % 32);
      }
    }
  }
}
template <class T, bool kWhole>
DEVICE void store_runs(void* to, const Place& at, const Raw& raw) {
  constexpr int kWords = sizeof(T) * kRun / 4, kShift = 8 * sizeof(T), kInWord = 4 / sizeof(T);
  T* p = assume_global(static_cast<T*>(to) + at.first);
#pragma unroll
  for (int run = 0; run < kRuns; ++run, p += kRunStride) {
    const Words4& words = raw.v[run];
    if constexpr (kWhole) {
      Vec<uint32_t, kWords> out;
#pragma unroll
      for (int i = 0; i < kWords; ++i) out.v[i] = words.v[i];
      store(reinterpret_cast<Vec<uint32_t, kWords>*>(p), out);
    } else {
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        if (i < at.count(run))
          store(p + i, static_cast<T>(words.v[i / kInWord] >> (i % kInWord * kShift % 32)));
      }
    }
  }
}

// The i-th of a lane's elements.
template <class T>
DEVICE float value_of(const Raw& raw, int i) {
  const Words4& words = raw.v[i / kRun];
  if constexpr (sizeof(T) == 4) {
    return bit_cast<float>(words.v[i % kRun]);
  } else {
    const uint32_t pair = words.v[i % kRun / 2];
    return i % 2 ? high_half<T>(pair) : low_half<T>(pair);
  }
}

// 1 / x rounded to nearest, for x > 0: like __frcp_rn, without its slow path.
DEVICE float refined_reciprocal(float x) {
  const float about = reciprocal(x);
  return __fmaf_rn(about, __fmaf_rn(-x, about, 1.0f), about);
}
DEVICE float rounded_reciprocal(float x) {
  constexpr float kUp = 0x1p64f, kDown = 0x1p-64f;
  if (x >= kDown && x <= kUp) return refined_reciprocal(x);
  const float factor = x < kDown ? kUp : x > kUp ? kDown : 1.0f;
  return __fmul_rn(refined_reciprocal(__fmul_rn(x, factor)), factor);
}
// Finds the parameter that contains a moment block. Called by a whole warp: a 32-way search.
DEVICE int tensor_with(const StepTensor* tensors, int count, int64_t block) {
  int low = 0, high = count;
  while (high - low > 1) {
    const int stride = (high - low + kWarp - 1) / kWarp, i = low + lane_index() * stride;
    const bool reached = i < high && load(&tensors[i].first_block) <= block;
    const int last = __popc(__ballot_sync(kAllLanes, reached)) - 1;
    low += last * stride;
    high = low + stride < high ? low + stride : high;
  }
  return low;
}

// Moment blocks per thread block: `each`, and one more for the first `longer` ones.
struct Shares {
  int64_t each;
  int longer;
  DEVICE int64_t begin(int block) const { return each * block + (block < longer ? block : longer); }
};

// Calls body(parameter, begin, end) for the moment blocks of this thread block, parameter by parameter.
template <class Body>
DEVICE void for_each_tensor(const Step& p, const Shares& shares, const Body& body) {
  const int64_t begin = shares.begin(block_index()), end = shares.begin(block_index() + 1);
  if (begin == end) return;
  int i = tensor_with(p.tensors, p.count, begin);
  int at = static_cast<int>(begin - load(&p.tensors[i].first_block));
  for (int left = static_cast<int>(end - begin); left > 0; ++i) {
    const int count = static_cast<int>((load(&p.tensors[i].numel) + kStateBlock - 1) / kStateBlock);
    const int stop = count < at + left ? count : at + left;
    body(i, at, stop);
    left -= stop - at;
    at = 0;
  }
}

// The place of a lane's elements of a moment block.
DEVICE Place place(int block, int64_t numel, bool has_vectors) {
  const int64_t first = int64_t{block} * kStateBlock + lane_index() * kRun, left = numel - first;
  return {first,
          left < 0             ? 0
          : left < kStateBlock ? static_cast<int>(left)
                               : static_cast<int>(kStateBlock),
          has_vectors && (int64_t{block} + 1) * kStateBlock <= numel};
}

DEVICE bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

}  // namespace peft_kernels::cuda
