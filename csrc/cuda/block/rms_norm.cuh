// The RMS norm of rows, or of the sum of two tensors, as in peft_kernels/ops/block/rms_norm.py.
#pragma once

#include "norm_rows.cuh"

namespace peft_kernels::cuda {

// Calls body with a value of x's dtype, which may differ from T where x is added to a residual of fp32.
template <class T, class Body>
DEVICE void with_addend_type(DType dtype, const Body& body) {
  if constexpr (sizeof(T) == sizeof(float)) {
    with_any_type(dtype, body);
  } else {
    body(T{});
  }
}

// x + residual, also written to `sum`.
template <class X, class T, int kWidth>
DEVICE Vec<T, kWidth> store_sum(const Vec<X, kWidth>& x, const Vec<T, kWidth>& residual, T* sum) {
  float added[kWidth];
#pragma unroll
  for (int i = 0; i < kWidth; ++i) added[i] = to_float(x.v[i]) + to_float(residual.v[i]);
  const auto rounded = from_floats<T, kWidth>(added);
  store(reinterpret_cast<Vec<T, kWidth>*>(sum), rounded);
  return rounded;
}

template <class T, int kWidth>
DEVICE void add_squares(const Vec<T, kWidth>& x, float& sum) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) sum = __fmaf_rn(to_float(x.v[i]), to_float(x.v[i]), sum);
}

DEVICE float rstd_of(const RmsNormForward& p, float squares) {
  return rsqrtf(__fmaf_rn(squares, p.rows.per_feature, p.eps));
}

template <class Out, class T, int kWidth>
DEVICE void store_normed(const NormRows& rows, const Vec<T, kWidth>& x, const float (&weight)[kWidth],
                         float rstd, Out* out) {
  float y[kWidth];
  normalize(rows, x, rstd, y);
#pragma unroll
  for (int i = 0; i < kWidth; ++i) y[i] *= weight[i];
  store_floats(out, y);
}

// Rows that fit into registers: x is read once. A block keeps the weight for all of its rows.
template <class T, bool kAdd, int kRowThreads, int kElements>
struct RmsNorm : RowsInRegisters<T, kRowThreads, kElements> {
  using Layout = RowsInRegisters<T, kRowThreads, kElements>;
  using Layout::kVectors, Layout::kWidth, Layout::kStep, Layout::kRowsOfBlock;
  using typename Layout::Elements;
  static constexpr int kBlocksPerSm = (kElements <= 8 ? 1536 : 1024) / (kAdd ? 2 : 1) / Layout::kThreads;
  using Params = RmsNormForward;
  using Shared = RowSums<kRowThreads>;

  static DEVICE void run(const Params& p) {
    const int features = static_cast<int>(p.rows.features), column = Layout::first_column();
    typename Layout::Floats weight;
    Layout::for_vectors(features, [&](int v) { load_weight(p.rows, column + v * kStep, weight[v]); });
    int parity = 0;
    for (int64_t first = int64_t{block_index()} * kRowsOfBlock; first < p.rows.m;
         first += int64_t{grid_size()} * kRowsOfBlock, parity ^= 1) {
      const int64_t row = first + Layout::row_in_block(), at = row * features + column;
      // Lanes without a row take part in the sums of their warp.
      const int end = row < p.rows.m ? features : 0;
      Elements x[kVectors];
      load_row(p, at, end, x);
      float squares = 0.0f;
      Layout::for_vectors(end, [&](int v) { add_squares(x[v], squares); });
      const float rstd = rstd_of(p, sum_of_row(squares, parity, shared_memory<Shared>()));
      if (column == 0 && end > 0) store(p.rstd + row, rstd);
      with_wider_type<T>(p.out_dtype, [&](auto type) {
        auto* out = static_cast<decltype(type)*>(p.out) + at;
        Layout::for_vectors(end,
                            [&](int v) { store_normed(p.rows, x[v], weight[v], rstd, out + v * kStep); });
      });
    }
  }

 private:
  // Reads a row of x, or adds two; `at`: this thread's first element.
  static DEVICE void load_row(const Params& p, int64_t at, int end, Elements (&x)[kVectors]) {
    if constexpr (!kAdd) {
      const T* from = static_cast<const T*>(p.x) + at;
      Layout::for_vectors(
          end, [&](int v) { x[v] = load_constant(reinterpret_cast<const Elements*>(from + v * kStep)); });
    } else {
      with_addend_type<T>(p.x_dtype, [&](auto type) {
        using Addend = Vec<decltype(type), kWidth>;
        const auto* from = static_cast<const decltype(type)*>(p.x) + at;
        const T* residual = static_cast<const T*>(p.residual) + at;
        T* sum = static_cast<T*>(p.sum) + at;
        Addend addend[kVectors];
        Layout::for_vectors(end, [&](int v) {
          addend[v] = load_constant(reinterpret_cast<const Addend*>(from + v * kStep));
          x[v] = load_constant(reinterpret_cast<const Elements*>(residual + v * kStep));
        });
        Layout::for_vectors(end, [&](int v) { x[v] = store_sum(addend[v], x[v], sum + v * kStep); });
      });
    }
  }
};

// Rows of any length: x, or the sum, is read again, from a cache.
template <class T, bool kAdd, int kWidth>
struct RmsNormLoop {
  static constexpr int kThreads = kLoopThreads, kRowsOfBlock = 1;
  static constexpr int kBlocksPerSm = 4;
  using Elements = Vec<T, kWidth>;
  using Params = RmsNormForward;
  using Shared = RowSums<kThreads>;

  static DEVICE void run(const Params& p) {
    int parity = 0;
    for (int64_t row = block_index(); row < p.rows.m; row += grid_size(), parity ^= 1) {
      const int64_t start = row * p.rows.features;
      const float rstd = rstd_of(p, sum_of_row(squares_of(p, start), parity, shared_memory<Shared>()));
      if (thread_index() == 0) store(p.rstd + row, rstd);
      with_wider_type<T>(p.out_dtype, [&](auto type) {
        auto* out = static_cast<decltype(type)*>(p.out) + start;
        for_columns<kWidth>(p.rows.features, [&](int64_t i) {
          float weight[kWidth];
          load_weight(p.rows, i, weight);
          // The sum was written by this thread: not load_constant.
          const Elements x =
              kAdd ? load(elements(p.sum, start + i)) : load_constant(elements(p.x, start + i));
          store_normed(p.rows, x, weight, rstd, out + i);
        });
      });
    }
  }

 private:
  static DEVICE const Elements* elements(const void* tensor, int64_t at) {
    return reinterpret_cast<const Elements*>(static_cast<const T*>(tensor) + at);
  }

  static DEVICE float squares_of(const Params& p, int64_t start) {
    float squares = 0.0f;
    if constexpr (!kAdd) {
      for_columns<kWidth>(p.rows.features,
                          [&](int64_t i) { add_squares(load_constant(elements(p.x, start + i)), squares); });
    } else {
      with_addend_type<T>(p.x_dtype, [&](auto type) {
        using Addend = Vec<decltype(type), kWidth>;
        const auto* from = static_cast<const decltype(type)*>(p.x) + start;
        T* sum = static_cast<T*>(p.sum) + start;
        for_columns<kWidth>(p.rows.features, [&](int64_t i) {
          const Addend addend = load_constant(reinterpret_cast<const Addend*>(from + i));
          add_squares(store_sum(addend, load_constant(elements(p.residual, start + i)), sum + i), squares);
        });
      });
    }
    return squares;
  }
};

}  // namespace peft_kernels::cuda
