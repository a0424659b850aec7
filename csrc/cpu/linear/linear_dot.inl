// Micro-kernel with vectors along the summed dimension: kDotRows rows of lhs by 4 rows of a panel.
//
//   lhs  [ ------ depth ------ ] x kDotRows   .   panel [ ------ depth ------ ] x 4   ->   kDotRows x 4 sums

// fp32 arithmetic on lhs of any dtype, read in place.
template <class T>
struct DotF32 : FloatSteps {
  using Lhs = T;
  static constexpr int kStep = kLanes;
  static Vec load_lhs(const T* p) { return load(p); }
  static Vec load_lhs_part(const T* p, int64_t count) { return load_part(p, count); }
};

#if !PEFT_KERNELS_BF16_DOT
using DotBF16 = DotF32<BF16>;
#endif

// tile[r][c] += lhs[r] . panel[c]. Panel rows are padded with zeros to a whole step.
template <class Dot, int kRows>
void dot_tile(const typename Dot::Lhs* lhs, int64_t lhs_ld, const typename Dot::Value* panel,
              int64_t panel_ld, int64_t depth, float* tile, int64_t tile_ld) {
  Vec sums[kRows][4];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) sums[r][c] = zero();
  }
  const auto step = [&](int64_t k, auto&& load_lhs) __attribute__((always_inline)) {
    decltype(Dot::load_lhs(lhs)) a[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) a[r] = load_lhs(lhs + r * lhs_ld + k);
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) {
      const auto b = Dot::load_steps(panel + c * panel_ld + k);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sums[r][c] = Dot::mac(a[r], b, sums[r][c]);
    }
  };
  int64_t k = 0;
  for (; k + Dot::kStep <= depth; k += Dot::kStep) {
    step(k, [](const auto* p) __attribute__((always_inline)) { return Dot::load_lhs(p); });
  }
  // lhs is not padded: the memory after it may hold an Inf, or be out of bounds.
  if (k < depth) {
    const int64_t count = depth - k;
    step(k, [count](const auto* p) __attribute__((always_inline)) { return Dot::load_lhs_part(p, count); });
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    add_lane_sums(sums[r][0], sums[r][1], sums[r][2], sums[r][3], tile + r * tile_ld);
  }
}

// Any number of rows up to kRows.
template <class Dot, int kRows>
void dot_rows(int64_t rows, const typename Dot::Lhs* lhs, int64_t lhs_ld, const typename Dot::Value* panel,
              int64_t panel_ld, int64_t depth, float* tile, int64_t tile_ld) {
  if constexpr (kRows > 1) {
    if (rows < kRows)
      return dot_rows<Dot, kRows - 1>(rows, lhs, lhs_ld, panel, panel_ld, depth, tile, tile_ld);
  }
  dot_tile<Dot, kRows>(lhs, lhs_ld, panel, panel_ld, depth, tile, tile_ld);
}
