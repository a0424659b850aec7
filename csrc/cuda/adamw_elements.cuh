// What all kernels over an optimizer's parameters do: share blocks of moments out, and move elements.
#pragma once

#include "../common/dynamic_map.h"
#include "adamw.h"
#include "device.cuh"

namespace peft_kernels::cuda {

inline constexpr int kStepThreads = 128, kStepWarps = kStepThreads / kWarp;

// Eight elements of a lane, as they lie in memory: four from `first` on and four from 128 after that.
inline constexpr int kRuns = 2, kRun = 4, kRunStride = kWarp * kRun;
static_assert(kRuns * kRunStride == kStateBlock);
struct Place {
  int64_t first;
  int left;    // elements of the parameter from there on, as far as they matter
  bool whole;  // all that a warp has, by vectors
  DEVICE int count(int run) const {
    const int n = left - run * kRunStride;
    return n < 0 ? 0 : n < kRun ? n : kRun;
  }
};

using Raw = Vec<Words4, kRuns>;

template <class T>
DEVICE void load_run(const void* from, const Place& at, int run, Words4& raw) {
  const T* p = static_cast<const T*>(from) + at.first + run * kRunStride;
  __builtin_assume(__isGlobal(p));  // pointers from a table might be anything
  constexpr int kWords = sizeof(T) * kRun / 4, kShift = 8 * sizeof(T), kInWord = 4 / sizeof(T);
  if (at.whole) {
    const auto words = load(reinterpret_cast<const Vec<uint32_t, kWords>*>(p));
#pragma unroll
    for (int i = 0; i < kWords; ++i) raw.v[i] = words.v[i];
  } else {
#pragma unroll
    for (int i = 0; i < kWords; ++i) raw.v[i] = 0;
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      if (i < at.count(run))
        raw.v[i / kInWord] |= static_cast<uint32_t>(load(p + i)) << (i % kInWord * kShift % 32);
    }
  }
}
template <class T>
DEVICE void store_run(void* to, const Place& at, int run, const Words4& raw) {
  T* p = static_cast<T*>(to) + at.first + run * kRunStride;
  __builtin_assume(__isGlobal(p));
  constexpr int kWords = sizeof(T) * kRun / 4, kShift = 8 * sizeof(T), kInWord = 4 / sizeof(T);
  if (at.whole) {
    Vec<uint32_t, kWords> words;
#pragma unroll
    for (int i = 0; i < kWords; ++i) words.v[i] = raw.v[i];
    store(reinterpret_cast<Vec<uint32_t, kWords>*>(p), words);
  } else {
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      if (i < at.count(run)) store(p + i, static_cast<T>(raw.v[i / kInWord] >> (i % kInWord * kShift % 32)));
    }
  }
}
// Of one type all runs, so that they are under way together.
template <class T>
DEVICE void load_runs(const void* from, const Place& at, Raw& raw) {
#pragma unroll
  for (int run = 0; run < kRuns; ++run) load_run<T>(from, at, run, raw.v[run]);
}
DEVICE void load_floats(const void* from, DType dtype, const Place& at, Raw& raw) {
  dtype == DType::kF32 ? load_runs<uint32_t>(from, at, raw) : load_runs<uint16_t>(from, at, raw);
}

// The numbers of four elements, and back.
DEVICE float number(const Words4& raw, DType dtype, int i) {
  if (dtype == DType::kF32) return bit_cast<float>(raw.v[i]);
  const uint16_t half = static_cast<uint16_t>(raw.v[i / 2] >> (i % 2 * 16));
  return dtype == DType::kBF16 ? to_float(bf16{half}) : to_float(fp16{half});
}
DEVICE uint32_t code(const Words4& raw, int i) { return raw.v[0] >> (8 * i) & 0xff; }

// The parameter that has a block of a moment, for a whole warp: it narrows down by 32 at a time.
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

// How the blocks of moments are shared out: so many to each block of threads, and one more to the first ones.
struct Shares {
  int64_t each;
  int longer;
  DEVICE int64_t begin(int block) const { return each * block + (block < longer ? block : longer); }
};

// The blocks of moments that a block of threads has, parameter by parameter.
template <class Body>
DEVICE void for_each_tensor(const Step& p, const Shares& shares, const Body& body) {
  const int64_t begin = shares.begin(block_index()), end = shares.begin(block_index() + 1);
  if (begin == end) return;
  int i = tensor_with(p.tensors, p.count, begin);
  for (int64_t at = begin; at < end; ++i) {
    const StepTensor& t = p.tensors[i];
    const int64_t first = load(&t.first_block), numel = load(&t.numel);
    const int64_t after = first + (numel + kStateBlock - 1) / kStateBlock, stop = after < end ? after : end;
    body(i, static_cast<int>(at - first), static_cast<int>(stop - first));
    at = stop;
  }
}

// Where a lane's elements of a block are.
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
