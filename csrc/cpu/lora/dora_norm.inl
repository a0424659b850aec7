// The squared norms of a frozen weight's rows, for DoRA.

// out[row] = sum of squares of rows [begin, end) of a matrix with `cols` columns.
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
