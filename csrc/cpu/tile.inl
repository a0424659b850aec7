// What both matrix products share: fp32 output tiles, and rows of a matrix as panel rows.

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

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
