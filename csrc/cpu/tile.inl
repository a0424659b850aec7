// What several kernels share: loops over vectors, e^x, fp32 output tiles, and rows of a matrix as panel rows.

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max64(int64_t a, int64_t b) { return a < b ? b : a; }
inline int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

inline int64_t element_bytes(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

// Calls step(index, count) for every vector of [begin, end); count is kLanes but for the last one.
template <class Step>
inline void for_lanes(int64_t begin, int64_t end, const Step& step) {
  for (int64_t i = begin; i < end; i += kLanes) step(i, min64(kLanes, end - i));
}

template <class T>
inline Vec load_lanes(const T* p, int64_t count) {
  return count == kLanes ? load(p) : load_part(p, count);
}
template <class T>
inline void store_lanes(T* p, Vec x, int64_t count) {
  count == kLanes ? store(p, x) : store_part(p, x, count);
}

inline Vec negate(Vec x) { return sub(splat(-0.0f), x); }

// e^x within 2 ulp. Clamped to where the result is a normal number; a NaN comes through.
inline Vec exponential(Vec x) {
  x = max(splat(-87.0f), min(splat(88.0f), x));
  // x = n ln 2 + r: adding 1.5 * 2^23 rounds to an integer, which lands, biased as an exponent, in the low
  // bits.
  const Vec shift = splat(12582912.0f + 127.0f);
  const Vec shifted = fma(x, splat(1.44269504089f), shift);
  const Vec n = sub(shifted, shift);
  const Vec r = fma(n, splat(-1.42860677e-6f), fma(n, splat(-0.693145752f), x));
  Vec sum = splat(1.0f / 5040);
  sum = fma(sum, r, splat(1.0f / 720));
  sum = fma(sum, r, splat(1.0f / 120));
  sum = fma(sum, r, splat(1.0f / 24));
  sum = fma(sum, r, splat(1.0f / 6));
  sum = fma(sum, r, splat(0.5f));
  sum = fma(sum, r, splat(1.0f));
  sum = fma(sum, r, splat(1.0f));
  return mul(sum, low_bits_to_exponent(shifted));
}

template <class T>
void widen_run(const T* x, int64_t count, float scale, float* out) {
  const Vec s = splat(scale);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, mul(load(x + i), s));
  if (i < count) store_part(out + i, mul(load_part(x + i, count - i), s), count - i);
}

// `count` elements of a dense array from element `first`, times `scale`, as fp32.
inline void widen_run(const void* x, DType dtype, int64_t first, int64_t count, float scale, float* out) {
  switch (dtype) {
    case DType::kF32:
      return widen_run(static_cast<const float*>(x) + first, count, scale, out);
    case DType::kBF16:
      return widen_run(static_cast<const BF16*>(x) + first, count, scale, out);
    case DType::kF16:
      return widen_run(static_cast<const F16*>(x) + first, count, scale, out);
  }
}

template <class T>
void narrow_run(const float* x, int64_t count, T* out) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, load(x + i));
  if (i < count) store_part(out + i, load_part(x + i, count - i), count - i);
}

// Sets an fp32 tile, rows of `tile_ld`, to what the sums start from. Columns from cols to tile_ld start at 0.
inline void start_tile(const GemmParams& p, int64_t m0, int64_t rows, int64_t n0, int64_t cols, float* tile,
                       int64_t tile_ld) {
  for (int64_t i = 0; i < rows; ++i) {
    float* row = tile + i * tile_ld;
    memset(row, 0, tile_ld * sizeof(float));
    if (p.add_to_out) {
      widen_run(p.out, p.out_dtype, (m0 + i) * p.out_ld + n0, cols, 1.0f, row);
    } else if (p.bias) {
      widen_run(p.bias, p.bias_dtype, n0, cols, 1.0f, row);
    }
  }
}

// Rounds a tile to the output's type, once.
inline void finish_tile(const GemmParams& p, int64_t m0, int64_t rows, int64_t n0, int64_t cols,
                        const float* tile, int64_t tile_ld) {
  for (int64_t i = 0; i < rows; ++i) {
    const float* row = tile + i * tile_ld;
    const int64_t first = (m0 + i) * p.out_ld + n0;
    switch (p.out_dtype) {
      case DType::kF32:
        narrow_run(row, cols, static_cast<float*>(p.out) + first);
        break;
      case DType::kBF16:
        narrow_run(row, cols, static_cast<BF16*>(p.out) + first);
        break;
      case DType::kF16:
        narrow_run(row, cols, static_cast<F16*>(p.out) + first);
        break;
    }
  }
}

// `count` elements of either kind of matrix, from element `first`. rhs_scale applies to a dense one.
inline void fill_panel_row(const MatrixView& rhs, int64_t first, int64_t count, float scale, float* out) {
  if (rhs.nf4) {
    dequantize_run(*rhs.nf4, first, count, out);
  } else {
    widen_run(rhs.data, rhs.dtype, first, count, scale, out);
  }
}

// The sums of squares in rows [begin, end) of a matrix with `cols` columns.
void row_squares(const MatrixView& matrix, int64_t cols, int64_t begin, int64_t end, float* out) {
  constexpr int64_t kRun = 512;
  float run[kRun];
  for (int64_t row = begin; row < end; ++row) {
    float total = 0.0f;
    for (int64_t c = 0; c < cols; c += kRun) {
      const int64_t count = min64(kRun, cols - c), padded = round_up(count, 4 * kLanes);
      fill_panel_row(matrix, row * matrix.ld + c, count, 1.0f, run);
      memset(run + count, 0, (padded - count) * sizeof(float));
      Vec sums[4] = {zero(), zero(), zero(), zero()};
      for (int64_t i = 0; i < padded; i += 4 * kLanes) {
#pragma GCC unroll 4
        for (int v = 0; v < 4; ++v) {
          const Vec x = load(run + i + v * kLanes);
          sums[v] = fma(x, x, sums[v]);
        }
      }
      float four[4] = {};
      add_lane_sums(sums[0], sums[1], sums[2], sums[3], four);
      total += (four[0] + four[1]) + (four[2] + four[3]);
    }
    out[row] = total;
  }
}
