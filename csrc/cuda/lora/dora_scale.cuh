// The magnitude scaling of DoRA: scales all of z but its bias, by column, and the gradients, as in
// peft_kernels/ops/lora/dora.py.
#pragma once

#include "../core/vectors.cuh"

namespace peft_kernels::cuda {

// Consecutive columns of a thread: 16 bytes of activations, or one element.
template <class T, bool kVector>
inline constexpr int kScaleWidth = kVector ? 16 / sizeof(T) : 1;

// A block has 32 * kWidth columns. Each of its warps has kRows rows.
template <class T, bool kVector>
struct ScaleColumns {
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerSm = 4;
  static constexpr int kWidth = kScaleWidth<T, kVector>;
  static constexpr int kRows = 4;
  static constexpr int kRowsOfBlock = kThreads / kWarp * kRows;
  using Elements = Vec<T, kWidth>;

  struct Params {
    const Elements* z;  // [m, width]
    const float* scale;
    const float* bias;  // or null
    int64_t m, width;
    int64_t column_blocks;
    Elements* y;
  };

  static DEVICE void run(const Params& p) {
    const int64_t column = block_index() % p.column_blocks * kWarp + lane_index();
    const int64_t first = block_index() / p.column_blocks * kRowsOfBlock + warp_index() * kRows;
    if (column >= p.width) return;
    Elements z[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      z[i] = {};
      if (first + i < p.m) z[i] = load_constant(p.z + (first + i) * p.width + column);
    }
    float scale[kWidth], bias[kWidth];
    load_floats(p.scale + column * kWidth, scale);
    if (p.bias) load_floats(p.bias + column * kWidth, bias);
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (first + i >= p.m) return;
      Elements y;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const float x = to_float(z[i].v[j]);
        // Not (z - bias) * scale + bias: a scale of 1 must not change any bit.
        y.v[j] = from_float<T>(p.bias ? __fmaf_rn(x - bias[j], scale[j] - 1.0f, x) : x * scale[j]);
      }
      store(p.y + (first + i) * p.width + column, y);
    }
  }
};

// A block has 32 * kWidth columns and a strip of rows, which its warps take in turn, kRows at a time. The
// order of sums depends on the shape and the number of strips.
template <class T, bool kVector>
struct ScaleColumnsBackward {
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerSm = 2;
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr int kWidth = kScaleWidth<T, kVector>;
  static constexpr int kRows = 4;
  static constexpr int kRowsOfBlock = kWarps * kRows;
  using Elements = Vec<T, kWidth>;

  struct Params {
    const Elements* dy;  // [m, width]
    const Elements* z;
    const float* scale;
    const float* bias;  // or null
    int64_t m, width;
    int64_t column_blocks;
    int64_t strip_rows;  // a multiple of kRowsOfBlock
    Elements* dz;
    float* d_scale;  // [strips, width * kWidth]
  };
  struct Shared {
    float sum[kWarps][kWarp * kWidth];
  };

  static DEVICE void run(const Params& p) {
    const int warp = warp_index();
    const int64_t columns = block_index() % p.column_blocks * kWarp, column = columns + lane_index();
    const int64_t strip = block_index() / p.column_blocks, begin = strip * p.strip_rows;
    const int64_t end = begin + p.strip_rows < p.m ? begin + p.strip_rows : p.m;
    float sums[kWidth] = {};
    if (column < p.width) {
      float scale[kWidth], bias[kWidth] = {};
      load_floats(p.scale + column * kWidth, scale);
      if (p.bias) load_floats(p.bias + column * kWidth, bias);
      for (int64_t row = begin + warp * kRows; row < end; row += kRowsOfBlock) {
        add_rows(p, row, end, column, scale, bias, sums);
      }
    }
    Shared* shared = shared_memory<Shared>();
#pragma unroll
    for (int j = 0; j < kWidth; ++j) store(&shared->sum[warp][lane_index() * kWidth + j], sums[j]);
    __syncthreads();
    const int mine = thread_index();
    const int64_t n = p.width * kWidth, at = columns * kWidth + mine;
    if (mine >= kWarp * kWidth || at >= n) return;
    float sum = 0.0f;
    for (int i = 0; i < kWarps; ++i) sum += load(&shared->sum[i][mine]);
    store(p.d_scale + strip * n + at, sum);
  }

 private:
  static_assert(kWarp * kWidth <= kThreads);

  static DEVICE void add_rows(const Params& p, int64_t row, int64_t end, int64_t column,
                              const float (&scale)[kWidth], const float (&bias)[kWidth],
                              float (&sums)[kWidth]) {
    Elements z[kRows], dy[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      z[i] = dy[i] = {};
      if (row + i < end) {
        z[i] = load_constant(p.z + (row + i) * p.width + column);
        dy[i] = load_constant(p.dy + (row + i) * p.width + column);
      }
    }
    // A separate sum, which keeps chains of roundings shorter than the strip.
    float sum[kWidth] = {};
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (row + i >= end) break;
      Elements dz;
#pragma unroll
      for (int j = 0; j < kWidth; ++j) {
        const float d = to_float(dy[i].v[j]);
        sum[j] = __fmaf_rn(d, to_float(z[i].v[j]) - bias[j], sum[j]);
        dz.v[j] = from_float<T>(d * scale[j]);
      }
      store(p.dz + (row + i) * p.width + column, dz);
    }
#pragma unroll
    for (int j = 0; j < kWidth; ++j) sums[j] += sum[j];
  }
};

}  // namespace peft_kernels::cuda
