// Shared by the GEMM kernels: step arithmetic, fp32 tiles of the output, and copies of matrix rows into
// panels.

// An integer template argument as a value.
template <int kN>
struct Constant {
  static constexpr int kValue = kN;
  constexpr operator int() const { return kN; }
};

// A step is what one lane multiplies at once.
struct FloatSteps {
  using Value = float;
  static constexpr int kElements = 1;  // of a step
  static Vec load_steps(const void* p) { return load(static_cast<const float*>(p)); }
  static Vec splat_step(const float* p) { return splat(*p); }
  static Vec mac(Vec a, Vec b, Vec sum) { return fma(a, b, sum); }
};

// Whether a term can be multiplied in bf16: lhs is bf16, and rounding rhs to bf16 loses no more than
// dequantising to the activations' dtype does.
inline bool has_bf16_values(const GemmTerm& term) {
  return PEFT_KERNELS_BF16_DOT && term.lhs_dtype == DType::kBF16 &&
         (term.rhs.nf4 || (term.rhs.dtype == DType::kBF16 && term.rhs_scale == 1.0f));
}

#if PEFT_KERNELS_BF16_DOT
struct PairSteps {
  using Value = PanelBF16;
  static constexpr int kElements = 2;
  static VecPairs load_steps(const void* p) { return load_pairs(p); }
  static auto splat_step(const PanelBF16* p) { return splat_pair(p); }
  template <class Step>
  static Vec mac(Step a, VecPairs b, Vec sum) {
    return dot_pairs(a, b, sum);
  }
};
#endif

// Whether the first term is added to all of rows [m0, m1), unmasked.
inline bool first_term_covers(const GemmParams& p, int64_t m0, int64_t m1) {
  if (p.term_count == 0) return false;
  const GemmTerm& term = p.terms[0];
  return term.depth > 0 && term.mask.threshold == 0 && term.m_begin <= m0 && m1 <= term.m_end;
}
// Whether the output is a start value plus a single unmasked term.
inline bool is_one_term(const GemmParams& p, const Rect& rect) {
  return p.term_count == 1 && !p.add_to_out && first_term_covers(p, rect.m0, rect.m1);
}
// The start values of columns; false if they start from 0.
inline bool start_columns(const GemmParams& p, int64_t n0, int64_t cols, float* start) {
  if (p.bias) widen_run(p.bias, p.bias_dtype, n0, cols, 1.0f, start);
  return p.bias != nullptr;
}

// Prefetches a part of the output that will be written soon, and the residual there.
inline void prefetch_out(const GemmParams& p, int64_t m0, int64_t rows, int64_t n0, int64_t cols) {
  const int64_t size = element_bytes(p.out_dtype);
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t first = ((m0 + i) * p.out_ld + n0) * size;
    for (int64_t at = first; at < first + cols * size; at += 64) {
      __builtin_prefetch(static_cast<const char*>(p.out) + at, 1);
      if (p.residual) __builtin_prefetch(static_cast<const char*>(p.residual) + at);
    }
  }
}

// Sets an fp32 tile to the start values of the sums. Columns from cols to tile_ld start at 0.
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

// Adds start values and residual to a row of sums and rounds it. A sum of 0, of either sign, leaves the
// residual's bits unchanged.
template <bool kHasStart, bool kHasResidual, class T>
void finish_row(const float* sums, const float* start, const T* residual, int64_t count, T* out) {
  for_lanes(0, count, [&](int64_t i, int64_t lanes) {
    Vec sum = load_lanes(sums + i, lanes);
    if constexpr (kHasStart) sum = add(load_lanes(start + i, lanes), sum);
    if constexpr (kHasResidual) {
      const Vec r = load_lanes(residual + i, lanes);
      sum = where_zero(sum, r, add(r, sum));
    }
    store_lanes(out + i, sum, lanes);
  });
}

// Rounds a tile to the output's dtype, once. `start`: values per column, if the sums have not started from
// them.
inline void finish_tile(const GemmParams& p, int64_t m0, int64_t rows, int64_t n0, int64_t cols,
                        const float* tile, int64_t tile_ld, const float* start = nullptr) {
  with_type(p.out_dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t i = 0; i < rows; ++i, tile += tile_ld) {
      const int64_t first = (m0 + i) * p.out_ld + n0;
      T* out = static_cast<T*>(p.out) + first;
      const T* residual = p.residual ? static_cast<const T*>(p.residual) + first : nullptr;
      if (start) {
        residual ? finish_row<true, true>(tile, start, residual, cols, out)
                 : finish_row<true, false>(tile, start, residual, cols, out);
      } else {
        residual ? finish_row<false, true>(tile, start, residual, cols, out)
                 : finish_row<false, false>(tile, start, residual, cols, out);
      }
    }
  });
}

// Elements [first, first + count) of a dense or packed matrix. `scale` applies to a dense one.
inline void fill_panel_row(const MatrixView& rhs, int64_t first, int64_t count, float scale, float* out) {
  if (rhs.nf4) {
    dequantize_run(*rhs.nf4, first, count, out);
  } else {
    widen_run(rhs.data, rhs.dtype, first, count, scale, out);
  }
}

// The first `rows` by `cols` of a kLanes by kLanes block, times `scale`, transposed. Missing rows become
// zeros, missing columns are skipped.
template <class T>
inline void transpose_part(const T* x, int64_t ld, int64_t rows, int64_t cols, float scale, float* out,
                           int64_t out_ld) {
  const int64_t width = min64(kLanes, cols);
  Vec block[kLanes];
  for (int r = 0; r < kLanes; ++r) {
    block[r] = r < rows ? mul(load_lanes(x + r * ld, width), splat(scale)) : zero();
  }
  transpose(block);
  for (int c = 0; c < width; ++c) store(out + c * out_ld, block[c]);
}
