// Transposes a matrix, from one dtype to another.

// out[c, r] = copy[r, c] = scale * x[r, c]; either may be null.
template <class From, class To>
void transpose_matrix(const From* x, int64_t ld, int64_t rows, int64_t cols, To* out, int64_t out_ld,
                      float scale = 1.0f, To* copy = nullptr) {
  for (int64_t r = 0; r < rows; r += kLanes) {
    const int64_t height = min64(kLanes, rows - r);
    for (int64_t c = 0; c < cols; c += kLanes) {
      const int64_t width = min64(kLanes, cols - c);
      Vec block[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        block[i] = i < height ? mul(load_lanes(x + (r + i) * ld + c, width), splat(scale)) : zero();
      }
      for (int i = 0; copy && i < height; ++i) store_lanes(copy + (r + i) * cols + c, block[i], width);
      if (!out) continue;
      transpose(block);
      for (int i = 0; i < width; ++i) store_lanes(out + (c + i) * out_ld + r, block[i], height);
    }
  }
}

void transpose_rows(const TransposeParams& p, int64_t begin, int64_t end) {
  static_assert(kTransposeRows % kLanes == 0, "");
  with_type(p.dtype, [&](auto from) {
    with_type(p.out_dtype, [&](auto to) {
      using From = decltype(from);
      using To = decltype(to);
      To *out = static_cast<To*>(p.out), *copy = static_cast<To*>(p.copy);
      transpose_matrix(static_cast<const From*>(p.x) + begin * p.ld, p.ld, end - begin, p.cols,
                       out ? out + begin : nullptr, p.out_ld, p.scale,
                       copy ? copy + begin * p.cols : nullptr);
    });
  });
}
