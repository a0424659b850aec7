// GEMV with a weight of bytes: a few rows of lhs, read in place. Codes are decoded in registers, without
// their scales, and multiplied by as many rows as sums fit; the sums of up to kByteBlock columns are then
// scaled. Codes become pairs of bf16, which hold them exactly, where bytes can be permuted; else fp32.

constexpr int64_t kByteStep = 64;   // columns decoded at once
constexpr int64_t kByteRun = 1024;  // of one running sum, as in linear_gemv_dense.inl
static_assert(kSmallestByteBlock % kByteStep == 0, "");

// More rows are faster packed: bf16 on AMX from seven on, since a tile multiplies 16 in the time of six here.
inline int64_t few_byte_rows(const GemmTerm& term) {
  if (PEFT_KERNELS_TILES) return has_bf16_values(term) ? 6 : 16;
  return PEFT_KERNELS_PERMUTES_BYTES ? 32 : 16;
}

template <class Codes, class T>
struct FloatBytes {
  using Lhs = T;
  static constexpr float kFactor = Codes::kFactor;
  struct Values {
    Vec v[kByteStep / kLanes];
  };
  Values decode(const uint8_t* codes) const {
    typename Codes::Value stored[kByteStep];
    for (int i = 0; i < kByteStep; ++i) stored[i] = Codes::value(codes[i]);
    Values values;
    for (int i = 0; i < kByteStep / kLanes; ++i) values.v[i] = load(stored + i * kLanes);
    return values;
  }
  static Vec mac(const T* x, const Values& values, Vec sum) {
#pragma GCC unroll 16
    for (int i = 0; i < kByteStep / kLanes; ++i) sum = fma(load(x + i * kLanes), values.v[i], sum);
    return sum;
  }
};

#if PEFT_KERNELS_PERMUTES_BYTES
template <class Codes>
struct PairBytes {
  using Lhs = BF16;
  static constexpr float kFactor = 1.0f;
  using Values = OrderedPairs;
  typename Codes::Pairs table;
  Values decode(const uint8_t* codes) const { return table.decode(codes); }
  static Vec mac(const BF16* x, const Values& values, Vec sum) {
    sum = dot_pairs(load_pairs(x), values.first, sum);
    return dot_pairs(load_pairs(x + 2 * kLanes), values.second, sum);
  }
};
#else
template <class Codes>
using PairBytes = FloatBytes<Codes, BF16>;
#endif

// Whether this kernel computes a GEMM. The rows of the whole GEMM decide, as in linear_gemv.inl.
inline bool byte_gemv_serves(const GemmParams& p) {
  if (p.term_count == 0) return false;
  const GemmTerm& term = p.terms[0];
  return term.rhs.nf4 && !term.rhs.nf4->codes && term.depth > 0 && term.depth % kByteStep == 0 &&
         p.m <= few_byte_rows(term);
}

// tile[r][c] += lhs[r] . codes[c] over `depth` columns. scales[c]: of row c, the next `block_cols` columns'
// scale `scale_step` further; 0: one for all. Prefetches as many codes from `ahead` on.
template <class Bytes, int kRows, int kCols>
void byte_tile(const Bytes& bytes, const typename Bytes::Lhs* lhs, int64_t lhs_ld, const uint8_t* codes,
               int64_t codes_ld, int64_t depth, const float* const (&scales)[kCols], int64_t block_cols,
               int64_t scale_step, const uint8_t* ahead, float* tile) {
  Vec sums[kRows][kCols];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < kCols; ++c) sums[r][c] = zero();
  }
  for (int64_t k = 0, block = 0; k < depth; k += block_cols, block += scale_step) {
    const int64_t end = min64(k + block_cols, depth);
#pragma GCC unroll 4
    for (int c = 0; c < kCols; ++c) {
      Vec partial[kRows];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) partial[r] = zero();
      for (int64_t i = k; i < end; i += kByteStep) {
        __builtin_prefetch(ahead + c * codes_ld + i);
        const typename Bytes::Values values = bytes.decode(codes + c * codes_ld + i);
#pragma GCC unroll 8
        for (int r = 0; r < kRows; ++r) partial[r] = Bytes::mac(lhs + r * lhs_ld + i, values, partial[r]);
      }
      const Vec scale = splat(scales[c][block] * Bytes::kFactor);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) sums[r][c] = fma(partial[r], scale, sums[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    float four[4] = {};
    add_lane_sums(sums[r][0], kCols > 1 ? sums[r][1 % kCols] : zero(),
                  kCols > 2 ? sums[r][2 % kCols] : zero(), kCols > 3 ? sums[r][3 % kCols] : zero(), four);
    for (int c = 0; c < kCols; ++c) tile[r * kStrip + c] += four[c];
  }
}

// Rows of the weight whose sums fit in registers beside those of kRows rows of lhs.
template <int kRows>
constexpr int byte_cols() {
  return kRegisters == 32 ? (kRows <= 4 ? 4 : 2) : kRows <= 2 ? 4 : kRows <= 4 ? 2 : 1;
}

template <class Bytes>
struct ByteGemv {
  const GemmTerm& term;
  const Bytes bytes{};

  // Up to kRows rows of lhs from row m0 on, times columns [k, k + depth) of rows [n0, n0 + cols) of the
  // weight.
  template <int kRows>
  void multiply(int64_t m0, int64_t rows, int64_t n0, int64_t cols, int64_t k, int64_t depth,
                float* tile) const {
    if constexpr (kRows > 1) {
      if (rows < kRows) return multiply<kRows - 1>(m0, rows, n0, cols, k, depth, tile);
    }
    constexpr int kCols = byte_cols<kRows>();
    int64_t c = 0;
    for (; c + kCols <= cols; c += kCols) multiply<kRows, kCols>(m0, n0 + c, k, depth, tile + c);
    for (; c < cols; ++c) multiply<kRows, 1>(m0, n0 + c, k, depth, tile + c);
  }

 private:
  template <int kRows, int kCols>
  void multiply(int64_t m0, int64_t n0, int64_t k, int64_t depth, float* tile) const {
    const Nf4View& w = *term.rhs.nf4;
    const bool by_rows = w.block_shift == kWholeRowShift;
    const int64_t block_cols = by_rows ? kByteBlock : int64_t{1} << w.block_shift;
    const float* scales[kCols];
    for (int c = 0; c < kCols; ++c) {
      scales[c] = w.absmax + ((n0 + c) >> w.row_shift) * w.blocks_in_row + (by_rows ? 0 : k / block_cols);
    }
    const uint8_t* codes = w.packed + n0 * term.rhs.ld + k;
    const auto* lhs = static_cast<const typename Bytes::Lhs*>(term.lhs) + m0 * term.lhs_ld + k;
    byte_tile<Bytes, kRows, kCols>(bytes, lhs, term.lhs_ld, codes, term.rhs.ld, depth, scales, block_cols,
                                   by_rows ? 0 : 1, codes + kCols * term.rhs.ld, tile);
  }
};

template <class Bytes>
void byte_gemv_add_term(const GemmTerm& term, int64_t m0, int64_t rows, int64_t n0, int64_t cols,
                        float* tile) {
  constexpr int kPass = 8;
  const ByteGemv<Bytes> gemv{term};
  const int64_t pass = ceil_div(rows, ceil_div(rows, kPass));
  for (int64_t k = 0; k < term.depth; k += kByteRun) {
    const int64_t depth = min64(kByteRun, term.depth - k);
    for (int64_t r = 0; r < rows; r += pass) {
      gemv.template multiply<kPass>(m0 + r, min64(pass, rows - r), n0, cols, k, depth, tile + r * kStrip);
    }
  }
}

inline void byte_gemv_add_term(const GemmTerm& term, int64_t m0, int64_t rows, int64_t n0, int64_t cols,
                               float* tile) {
  with_byte_codes(*term.rhs.nf4, [&](auto codes) {
    using Codes = decltype(codes);
    if (term.lhs_dtype == DType::kBF16) {
      return byte_gemv_add_term<PairBytes<Codes>>(term, m0, rows, n0, cols, tile);
    }
    with_type(term.lhs_dtype, [&](auto type) {
      byte_gemv_add_term<FloatBytes<Codes, decltype(type)>>(term, m0, rows, n0, cols, tile);
    });
  });
}
