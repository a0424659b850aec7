// Rows to columns, from one type to another.

// out[c, r] = x[r, c].
template <class From, class To>
void transpose_matrix(const From* x, int64_t ld, int64_t rows, int64_t cols, To* out, int64_t out_ld) {
  for (int64_t r = 0; r < rows; r += kLanes) {
    const int64_t height = min64(kLanes, rows - r);
    for (int64_t c = 0; c < cols; c += kLanes) {
      const int64_t width = min64(kLanes, cols - c);
      Vec block[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        block[i] = i < height ? load_lanes(x + (r + i) * ld + c, width) : zero();
      }
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
      transpose_matrix(static_cast<const From*>(p.x) + begin * p.cols, p.cols, end - begin, p.cols,
                       static_cast<To*>(p.out) + begin, p.out_ld);
    });
  });
}
