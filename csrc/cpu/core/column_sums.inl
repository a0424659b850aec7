// Column sums of a matrix.

// Rows are summed 64 at a time, so that the error does not grow with the number of rows.
template <class T>
void column_sums_run(const ColumnSumsParams& p, int64_t begin, int64_t end) {
  constexpr int64_t kRows = 64, kStrip = 4;
  for (int64_t first = begin; first < end; first += kStrip * kLanes) {
    const int64_t last = min64(first + kStrip * kLanes, end);
    Vec totals[kStrip] = {zero(), zero(), zero(), zero()};
    for (int64_t chunk = 0; chunk < p.rows; chunk += kRows) {
      Vec sums[kStrip] = {zero(), zero(), zero(), zero()};
      for (int64_t r = chunk; r < min64(chunk + kRows, p.rows); ++r) {
        const T* row = static_cast<const T*>(p.x) + r * p.cols;
        for (int i = 0; i < kStrip; ++i) {
          const int64_t c = first + i * kLanes;
          if (c < last) sums[i] = add(sums[i], load_lanes(row + c, min64(kLanes, last - c)));
        }
      }
      for (int i = 0; i < kStrip; ++i) totals[i] = add(totals[i], sums[i]);
    }
    for (int i = 0; i < kStrip; ++i) {
      const int64_t c = first + i * kLanes;
      if (c < last) store_lanes(p.out + c, mul(totals[i], splat(p.scale)), min64(kLanes, last - c));
    }
  }
}

void column_sums(const ColumnSumsParams& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto type) { column_sums_run<decltype(type)>(p, begin, end); });
}
