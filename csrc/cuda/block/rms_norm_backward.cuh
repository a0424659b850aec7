// The gradients of RMS norms, as in peft_kernels/ops/block/rms_norm.py.
#pragma once

#include "norm_rows.cuh"

namespace peft_kernels::cuda {

struct RmsNormGradients {
  RmsNormGradient of;
  float* dweight;  // [blocks, features]: the sums over the rows of each block; null: not needed
};

// With g = (weight + offset) * dy: dx = rstd * (g - x * rstd * mean(g * x * rstd)), where x * rstd is not
// rounded.

template <int kWidth>
DEVICE void add_products(const float (&g)[kWidth], const float (&x)[kWidth], float rstd, float& sum) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sum = __fmaf_rn(g[i], x[i] * rstd, sum);
}

// dx, plus `add` in fp32.
template <class T, int kWidth>
DEVICE void store_dx(const float (&g)[kWidth], const float (&x)[kWidth], float rstd, float mean,
                     const float (&add)[kWidth], T* out) {
  float dx[kWidth];
#pragma unroll
  for (int i = 0; i < kWidth; ++i) dx[i] = __fmaf_rn(rstd, __fmaf_rn(x[i] * rstd, -mean, g[i]), add[i]);
  store_floats(out, dx);
}

template <class T, int kWidth>
DEVICE void add_to_dweight(const NormRows& rows, const Vec<T, kWidth>& x, float rstd,
                           const float (&dy)[kWidth], float (&sums)[kWidth]) {
  float normed[kWidth];
  normalize(rows, x, rstd, normed);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sums[i] = __fmaf_rn(dy[i], normed[i], sums[i]);
}

// Rows that fit into registers. A block sums the weight's gradient over all of its rows.
template <class T, bool kDweight, int kRowThreads, int kElements>
struct RmsNormBackward : RowsInRegisters<T, kRowThreads, kElements> {
  using Layout = RowsInRegisters<T, kRowThreads, kElements>;
  using Layout::kVectors, Layout::kWidth, Layout::kStep, Layout::kRowsOfBlock;
  using typename Layout::Elements, typename Layout::Floats;
  static constexpr int kBlocksPerSm = (kElements <= 8 ? 768 : 512) / Layout::kThreads;
  using Params = RmsNormGradients;
  static constexpr bool kAddsRows = kDweight && kRowsOfBlock > 1;
  struct Shared {
    alignas(16) float dweight[kAddsRows ? kRowsOfBlock : 1][kAddsRows ? kRowThreads * kElements : 4];
    RowSums<kRowThreads> row;
  };

  static DEVICE void run(const Params& params) {
    const RmsNormGradient& p = params.of;
    const int features = static_cast<int>(p.rows.features), column = Layout::first_column();
    Floats weight, sums = {};
    Layout::for_vectors(features, [&](int v) { load_weight(p.rows, column + v * kStep, weight[v]); });
    int parity = 0;
    for (int64_t first = int64_t{block_index()} * kRowsOfBlock; first < p.rows.m;
         first += int64_t{grid_size()} * kRowsOfBlock, parity ^= 1) {
      const int64_t row = first + Layout::row_in_block(), at = row * features + column;
      const int end = row < p.rows.m ? features : 0;
      const float rstd = end > 0 ? load_constant(p.rstd + row) : 0.0f;
      Elements x[kVectors], add[kVectors];
      Floats dy;
      load_row(p, at, end, x, add, dy);
      if constexpr (kDweight) {
        Layout::for_vectors(end, [&](int v) { add_to_dweight(p.rows, x[v], rstd, dy[v], sums[v]); });
      }
      if (!p.dx) continue;
      float dot = 0.0f;
      Layout::for_vectors(end, [&](int v) {
        float wide[kWidth];
        to_floats(x[v], wide);
#pragma unroll
        for (int i = 0; i < kWidth; ++i) dy[v][i] *= weight[v][i];
        add_products(dy[v], wide, rstd, dot);
      });
      const float mean = sum_of_row(dot, parity, &shared_memory<Shared>()->row) * p.rows.per_feature;
      T* dx = static_cast<T*>(p.dx) + at;
      Layout::for_vectors(end, [&](int v) {
        float wide[kWidth], start[kWidth] = {};
        to_floats(x[v], wide);
        if (p.add) to_floats(add[v], start);
        store_dx(dy[v], wide, rstd, mean, start, dx + v * kStep);
      });
    }
    if constexpr (kDweight) store_dweight(params, features, column, sums);
  }

 private:
  static DEVICE void load_row(const RmsNormGradient& p, int64_t at, int end, Elements (&x)[kVectors],
                              Elements (&add)[kVectors], Floats& dy) {
    const auto vector = [at](const void* tensor, int v) {
      return load_constant(reinterpret_cast<const Elements*>(static_cast<const T*>(tensor) + at + v * kStep));
    };
    Layout::for_vectors(end, [&](int v) { x[v] = vector(p.x, v); });
    if (p.add) Layout::for_vectors(end, [&](int v) { add[v] = vector(p.add, v); });
    with_wider_type<T>(p.dy_dtype, [&](auto type) {
      const auto* from = static_cast<const decltype(type)*>(p.dy) + at;
      Layout::for_vectors(end, [&](int v) { load_floats(from + v * kStep, dy[v]); });
    });
  }

  static DEVICE void store_dweight(const Params& params, int features, int column, const Floats& sums) {
    float* out = params.dweight + block_index() * int64_t{features};
    if constexpr (kRowsOfBlock == 1) {
      Layout::for_vectors(features, [&](int v) { store_floats(out + column + v * kStep, sums[v]); });
    } else {
      auto* shared = shared_memory<Shared>()->dweight;
      Layout::for_vectors(features, [&](int v) {
        store_floats(shared[Layout::row_in_block()] + column + v * kStep, sums[v]);
      });
      __syncthreads();
      for (int i = thread_index(); i < features; i += Layout::kThreads) {
        float sum = 0.0f;
#pragma unroll
        for (int row = 0; row < kRowsOfBlock; ++row) sum += load(&shared[row][i]);
        store(out + i, sum);
      }
    }
  }
};

// Rows of any length: x and dy are read twice, the second time from a cache; the sums of the weight's
// gradient are in memory.
template <class T, bool kDweight, int kWidth>
struct RmsNormBackwardLoop {
  static constexpr int kThreads = kLoopThreads, kRowsOfBlock = 1;
  static constexpr int kBlocksPerSm = 2;
  using Elements = Vec<T, kWidth>;
  using Params = RmsNormGradients;
  struct Shared {
    RowSums<kThreads> row;
  };

  static DEVICE void run(const Params& params) {
    const RmsNormGradient& p = params.of;
    float* sums = params.dweight + block_index() * p.rows.features;
    int parity = 0;
    for (int64_t row = block_index(); row < p.rows.m; row += grid_size(), parity ^= 1) {
      const float rstd = load_constant(p.rstd + row);
      const bool is_first = row == block_index();
      float dot = 0.0f;
      for_elements(p, row, [&](int64_t i, const Elements& x, const float (&dy)[kWidth]) {
        if constexpr (kDweight) {
          float sum[kWidth] = {};
          if (!is_first) load_floats<false>(sums + i, sum);
          add_to_dweight(p.rows, x, rstd, dy, sum);
          store_floats(sums + i, sum);
        }
        if (!p.dx) return;
        float g[kWidth], wide[kWidth];
        gradient(p, i, dy, g);
        to_floats(x, wide);
        add_products(g, wide, rstd, dot);
      });
      if (!p.dx) continue;
      const float mean = sum_of_row(dot, parity, &shared_memory<Shared>()->row) * p.rows.per_feature;
      for_elements(p, row, [&](int64_t i, const Elements& x, const float (&dy)[kWidth]) {
        const int64_t at = row * p.rows.features + i;
        float g[kWidth], wide[kWidth], start[kWidth] = {};
        gradient(p, i, dy, g);
        to_floats(x, wide);
        if (p.add) load_floats(static_cast<const T*>(p.add) + at, start);
        store_dx(g, wide, rstd, mean, start, static_cast<T*>(p.dx) + at);
      });
    }
  }

 private:
  template <class Body>
  static DEVICE void for_elements(const RmsNormGradient& p, int64_t row, const Body& body) {
    const int64_t start = row * p.rows.features;
    with_wider_type<T>(p.dy_dtype, [&](auto type) {
      const auto* dy = static_cast<const decltype(type)*>(p.dy) + start;
      const T* x = static_cast<const T*>(p.x) + start;
      for_columns<kWidth>(p.rows.features, [&](int64_t i) {
        float of_y[kWidth];
        load_floats(dy + i, of_y);
        body(i, load_constant(reinterpret_cast<const Elements*>(x + i)), of_y);
      });
    });
  }

  // (weight + offset) * dy.
  static DEVICE void gradient(const RmsNormGradient& p, int64_t column, const float (&dy)[kWidth],
                              float (&g)[kWidth]) {
    load_weight(p.rows, column, g);
#pragma unroll
    for (int i = 0; i < kWidth; ++i) g[i] *= dy[i];
  }
};

// out[i] = the sum over parts of partial[part][i]. A block has 32 columns, and its warps take the parts in
// turn.
template <class Out>
struct SumParts {
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerSm = 4;
  static constexpr int kWarps = kThreads / kWarp;

  struct Params {
    const float* partial;  // [parts, count]
    int64_t parts, count;
    Out* out;
  };
  struct Shared {
    float sum[kWarps][kWarp];
  };

  static DEVICE void run(const Params& p) {
    Shared* shared = shared_memory<Shared>();
    const int warp = thread_index() / kWarp;
    const int64_t i = int64_t{block_index()} * kWarp + lane_index();
    float sum = 0.0f;
    if (i < p.count) {
#pragma unroll 4
      for (int64_t part = warp; part < p.parts; part += kWarps)
        sum += load_constant(p.partial + part * p.count + i);
    }
    store(&shared->sum[warp][lane_index()], sum);
    __syncthreads();
    if (warp != 0 || i >= p.count) return;
    sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kWarps; ++j) sum += load(&shared->sum[j][lane_index()]);
    store(p.out + i, from_float<Out>(sum));
  }
};

}  // namespace peft_kernels::cuda
