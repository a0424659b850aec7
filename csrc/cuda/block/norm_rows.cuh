// How the threads of a norm share rows, and sums over a row.
#pragma once

#include "../core/vectors.cuh"
#include "rms_norm.h"

namespace peft_kernels::cuda {

// kRowThreads threads have a row of up to kRowThreads * kElements elements in registers, kVectors vectors of
// 16 bytes each. A block has 128 threads or more.
template <class T, int kRowThreads, int kElements>
struct RowsInRegisters {
  static constexpr int kThreads = kRowThreads < 128 ? 128 : kRowThreads;
  static constexpr int kRowsOfBlock = kThreads / kRowThreads;
  static constexpr int kWidth = 16 / sizeof(T);
  static constexpr int kVectors = kElements / kWidth;
  static constexpr int kStep = kRowThreads * kWidth;  // columns from one vector of a thread to the next
  using Elements = Vec<T, kWidth>;
  using Floats = float[kVectors][kWidth];

  static DEVICE int row_in_block() { return kRowsOfBlock == 1 ? 0 : thread_index() / kRowThreads; }
  static DEVICE int first_column() {
    return (kRowsOfBlock == 1 ? thread_index() : thread_index() % kRowThreads) * kWidth;
  }

  // Calls body(v) for each vector of this thread that begins before column `end`.
  template <class Body>
  static DEVICE void for_vectors(int end, const Body& body) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (first_column() + v * kStep < end) body(v);
    }
  }
};

// A block has a row of any length, which its threads read in turn, kWidth elements at a time.
inline constexpr int kLoopThreads = 256;

// Calls body(i) for the first column of each vector of this thread.
template <int kWidth, class Body>
DEVICE void for_columns(int64_t features, const Body& body) {
  constexpr int kUnroll = kWidth == 1 ? 1 : 2;
#pragma unroll kUnroll
  for (int64_t i = thread_index() * kWidth; i < features; i += kLoopThreads * kWidth) body(i);
}

// Sums of the warps of a row, alternately for even and odd rows of a block: a warp may be a row ahead.
template <int kRowThreads>
struct RowSums {
  float of_warp[2][kRowThreads > kWarp ? kRowThreads / kWarp : 1];
};

// The sum over a row's threads, in each of them. All threads of a block call it, `parity` 0 and 1 in turn.
template <int kRowThreads>
DEVICE float sum_of_row(float value, int parity, RowSums<kRowThreads>* shared) {
  constexpr int kLanes = kRowThreads < kWarp ? kRowThreads : kWarp;
#pragma unroll
  for (int mask = kLanes / 2; mask > 0; mask /= 2) value += __shfl_xor_sync(kAllLanes, value, mask);
  if constexpr (kRowThreads > kWarp) {
    float* of_warp = shared->of_warp[parity];
    if (lane_index() == 0) store(of_warp + thread_index() / kWarp, value);
    __syncthreads();
    value = 0.0f;
#pragma unroll
    for (int i = 0; i < kRowThreads / kWarp; ++i) value += load(of_warp + i);
  }
  return value;
}

// weight + offset, for kWidth columns.
template <int kWidth>
DEVICE void load_weight(const NormRows& rows, int64_t column, float (&weight)[kWidth]) {
  with_any_type(rows.weight_dtype, [&](auto type) {
    load_floats(static_cast<const decltype(type)*>(rows.weight) + column, weight);
  });
#pragma unroll
  for (int i = 0; i < kWidth; ++i) weight[i] += rows.offset;
}

// x * rstd as it is multiplied by the weight.
template <class T, int kWidth>
DEVICE void normalize(const NormRows& rows, const Vec<T, kWidth>& x, float rstd, float (&normed)[kWidth]) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) normed[i] = to_float(x.v[i]) * rstd;
  if (rows.rounds) round_floats<T>(normed);
}

}  // namespace peft_kernels::cuda
