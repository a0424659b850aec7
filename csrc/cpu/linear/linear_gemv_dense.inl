// Dense GEMV: a weight with short rows times a few rows of lhs, of equal dtypes. The weight is read in place,
// four rows at a time, at the speed of the memory.

constexpr int64_t kDenseRun = 1024;                // elements of one running sum: longer sums lose bits
static_assert(kDenseRun % (2 * kLanes) == 0, "");  // whole steps

template <class Dot>
bool has_whole_steps(const GemmTerm& term) {
  return has_values<Dot>(term) && term.depth % Dot::kStep == 0;
}

// Whether this kernel computes the first term of a GEMM. The rows of the whole GEMM decide, not those of this
// task: results must not depend on the division into tasks.
inline bool dense_gemv_serves(const GemmParams& p) {
  if (p.term_count == 0 || p.terms[0].depth <= kThinDepth) return false;
  const GemmTerm& term = p.terms[0];
  constexpr int64_t kShort = 4096;  // bytes; longer rows are left to the hardware prefetcher
  if (term.depth * element_bytes(term.lhs_dtype) > kShort) return false;
  if (term.lhs_dtype == DType::kF32) return p.m <= kFewFloatRows && has_whole_steps<DotF32<float>>(term);
  return p.m <= kFewRows && has_bf16_values(term) && has_whole_steps<DotBF16>(term);
}

// tile[r][c] += lhs[r] . weight[c]. Prefetches one line from `ahead` on, `line` bytes apart, per line read.
template <class Dot, int kRows, int kCols>
void dense_tile(const typename Dot::Lhs* lhs, int64_t lhs_ld, const typename Dot::Value* weight,
                int64_t weight_ld, int64_t depth, const char* ahead, int64_t line, float* tile) {
  Vec sums[kRows][4];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) sums[r][c] = zero();
  }
  constexpr int kStepBytes = Dot::kStep * sizeof(typename Dot::Value);
  for (int64_t k = 0; k < depth; k += Dot::kStep) {
    decltype(Dot::load_lhs(lhs)) a[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) a[r] = Dot::load_lhs(lhs + r * lhs_ld + k);
#pragma GCC unroll 4
    for (int c = 0; c < kCols; ++c) {
      if (kStepBytes * c % 64 == 0) {
        __builtin_prefetch(ahead);
        ahead += line;
      }
      const auto b = Dot::load_steps(weight + c * weight_ld + k);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sums[r][c] = Dot::mac(a[r], b, sums[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    float four[4] = {};
    add_lane_sums(sums[r][0], sums[r][1], sums[r][2], sums[r][3], four);
    for (int c = 0; c < kCols; ++c) tile[r * kStrip + c] += four[c];
  }
}

template <class Dot, int kRows, int kCols>
void dense_rows(int64_t rows, const typename Dot::Lhs* lhs, int64_t lhs_ld, const typename Dot::Value* weight,
                int64_t weight_ld, int64_t depth, const char* ahead, int64_t line, float* tile) {
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      return dense_rows<Dot, kRows - 1, kCols>(rows, lhs, lhs_ld, weight, weight_ld, depth, ahead, line,
                                               tile);
    }
  }
  dense_tile<Dot, kRows, kCols>(lhs, lhs_ld, weight, weight_ld, depth, ahead, line, tile);
}

template <class Dot>
void dense_gemv_add_term(const GemmTerm& term, int64_t m0, int64_t rows, int64_t n0, int64_t cols,
                         float* tile) {
  using Value = typename Dot::Value;
  constexpr int64_t kAhead = 4096, kSize = sizeof(Value);
  const auto* lhs = static_cast<const typename Dot::Lhs*>(term.lhs) + m0 * term.lhs_ld;
  const auto* weight = static_cast<const Value*>(term.rhs.data) + n0 * term.rhs.ld;
  const int64_t pass = ceil_div(rows, ceil_div(rows, kDotRows));
  for (int64_t c = 0, count; c < cols; c += count, weight += count * term.rhs.ld) {
    count = cols - c >= 4 ? 4 : 1;
    const auto multiply = count == 4 ? dense_rows<Dot, kDotRows, 4> : dense_rows<Dot, kDotRows, 1>;
    // The next rows are contiguous with these. Prefetch them in order: a few rows read side by side are too
    // short for the hardware prefetcher.
    const char* ahead = reinterpret_cast<const char*>(weight) + max64(kAhead, count * term.rhs.ld * kSize);
    for (int64_t k = 0; k < term.depth; k += kDenseRun) {
      const int64_t depth = min64(kDenseRun, term.depth - k);
      for (int64_t r = 0; r < rows; r += pass) {
        multiply(min64(pass, rows - r), lhs + r * term.lhs_ld + k, term.lhs_ld, weight + k, term.rhs.ld,
                 depth, ahead, r == 0 ? 64 : 0, tile + r * kStrip + c);
      }
      ahead += count * depth * kSize;
    }
  }
}

inline void dense_gemv_add_term(const GemmTerm& term, int64_t m0, int64_t rows, int64_t n0, int64_t cols,
                                float* tile) {
  has_bf16_values(term) ? dense_gemv_add_term<DotBF16>(term, m0, rows, n0, cols, tile)
                        : dense_gemv_add_term<DotF32<float>>(term, m0, rows, n0, cols, tile);
}
