// out[m, n] += lhs[m, :] . rhs[n, :]: the linear layer, and every GEMM whose operands both have the summed
// dimension along their rows.
//
// Rows of a packed weight become rows of a panel without a transposition. A panel is decoded once for many
// rows of lhs; it streams from L2 past the few rows of lhs that the micro-kernel keeps in L1.

constexpr int64_t kNtTileRows = 256;   // rows of lhs per decoded panel
constexpr int64_t kNtRowBytes = 3072;  // of one panel row: kDotRows rows of lhs of that length fit L1
constexpr int64_t kNtPanelLdBytes = kNtRowBytes + 64;  // keeps panel rows out of each other's cache sets
constexpr int64_t kNtTileBytes = kNtTileRows * kStrip * sizeof(float);
constexpr int64_t kNtPanelBytes = kStrip * kNtPanelLdBytes;
constexpr int64_t kGemvScratchBytes = kScratchBytes - kNtTileBytes - kNtPanelBytes;
static_assert(kGemvScratchBytes > 0, "");

#include "linear_gemv.inl"

inline int64_t nt_depth_block(int64_t depth, int64_t element_bytes) {
  const int64_t most = kNtRowBytes / element_bytes;
  const int64_t parts = (depth + most - 1) / most;
  return round_up((depth + parts - 1) / parts, kStrip);
}

// Whether a dense rhs can be multiplied without a conversion.
template <class Dot>
bool has_values(const GemmTerm& term) {
  constexpr DType kType = sizeof(typename Dot::Value) == sizeof(float) ? DType::kF32 : DType::kBF16;
  return !term.rhs.nf4 && term.rhs.dtype == kType && term.rhs_scale == 1.0f;
}

// Copies rows of rhs to rows of a panel, zero-padded to whole steps and to a multiple of four rows.
template <class Dot>
void nt_fill(const GemmTerm& term, int64_t first, int64_t depth, int64_t rows, typename Dot::Value* panel) {
  using Value = typename Dot::Value;
  constexpr int64_t kPanelLd = kNtPanelLdBytes / sizeof(Value);
  const int64_t padded_depth = round_up(depth, Dot::kStep);
  for (int64_t c = 0; c < rows; ++c) {
    Value* row = panel + c * kPanelLd;
    fill_panel_row(term.rhs, first + c * term.rhs.ld, depth, term.rhs_scale, row);
    if (depth < padded_depth) memset(row + depth, 0, (padded_depth - depth) * sizeof(Value));
  }
  for (int64_t c = rows; c < round_up(rows, 4); ++c) {
    memset(panel + c * kPanelLd, 0, padded_depth * sizeof(Value));
  }
}

// Adds a term to a tile of `rows` by `cols`; rows of the tile are kStrip apart.
template <class Dot>
void nt_add_term(const GemmTerm& term, int64_t m0, int64_t rows, int64_t n0, int64_t cols, float* tile,
                 void* panel_memory) {
  using Lhs = typename Dot::Lhs;
  using Value = typename Dot::Value;
  constexpr int64_t kPanelLd = kNtPanelLdBytes / sizeof(Value);
  const auto* lhs = static_cast<const typename Dot::Lhs*>(term.lhs) + m0 * term.lhs_ld;
  const int64_t block = nt_depth_block(term.depth, sizeof(Value));
  // For a few rows the panel is read as soon as it is written: keep it in L1.
  const bool are_few = rows <= 6 * kDotRows;
  const int64_t panel_rows = are_few ? 4 : kStrip;
  for (int64_t k0 = 0; k0 < term.depth; k0 += block) {
    const int64_t depth = min64(block, term.depth - k0);
    const int64_t padded_depth = round_up(depth, Dot::kStep);
    for (int64_t c0 = 0; c0 < cols; c0 += panel_rows) {
      const int64_t filled = min64(panel_rows, cols - c0), padded = round_up(filled, 4);
      const int64_t first = (n0 + c0) * term.rhs.ld + k0;
      const Value* panel = static_cast<const Value*>(panel_memory);
      int64_t panel_ld = kPanelLd;
      // For a few rows rhs is read in place, if its rows are whole vectors.
      if (are_few && filled == padded && depth == padded_depth && has_values<Dot>(term)) {
        panel = static_cast<const Value*>(term.rhs.data) + first;
        panel_ld = term.rhs.ld;
      } else {
        nt_fill<Dot>(term, first, depth, filled, static_cast<Value*>(panel_memory));
      }
      for (int64_t r = 0; r < rows; r += kDotRows) {
        // Prefetches the next rows while these are multiplied.
        const int64_t row_bytes = depth * sizeof(Lhs), share = ceil_div(kDotRows * row_bytes, padded / 4);
        const bool fetches = c0 == 0 && r + kDotRows < rows && term.lhs_ld == depth;
        const char* ahead = reinterpret_cast<const char*>(lhs + (r + kDotRows) * term.lhs_ld);
        for (int64_t c = 0; c < padded; c += 4, ahead += share) {
          for (int64_t at = 0; fetches && at < share; at += 64) __builtin_prefetch(ahead + at, 0, 2);
          dot_rows<Dot, kDotRows>(min64(kDotRows, rows - r), lhs + r * term.lhs_ld + k0, term.lhs_ld,
                                  panel + c * panel_ld, panel_ld, depth, tile + r * kStrip + c0 + c, kStrip);
        }
      }
    }
  }
}

#include "linear_gemv_bytes.inl"
#include "linear_gemv_dense.inl"

// The rhs of a thin term is transposed into one strip, for the outer-product micro-kernel.
inline bool is_thin(const GemmTerm& term) {
  return term.depth <= kThinDepth && term.lhs_dtype == DType::kF32 && !term.rhs.nf4;
}

inline void nt_fill_thin(const GemmTerm& term, int64_t n0, int64_t cols, void* panel_memory) {
  float* strip = static_cast<float*>(panel_memory);
  with_type(term.rhs.dtype, [&](auto type) {
    const auto* rhs = static_cast<const decltype(type)*>(term.rhs.data) + n0 * term.rhs.ld;
    for (int64_t c = 0; c < kStrip; c += kLanes) {
      for (int64_t k = 0; k < term.depth; k += kLanes) {
        transpose_part(rhs + c * term.rhs.ld + k, term.rhs.ld, cols - c, term.depth - k, term.rhs_scale,
                       strip + k * kStrip + c, kStrip);
      }
    }
  });
}

#if PEFT_KERNELS_BF16_DOT
// The same for pairs of bf16: a pair is transposed as one 32-bit lane.
inline bool is_thin_in_pairs(const GemmTerm& term) {
  return term.depth <= kThinDepth && term.depth % 2 == 0 && !term.rhs.nf4 && has_bf16_values(term);
}

inline void nt_fill_thin_pairs(const GemmTerm& term, int64_t n0, int64_t cols, void* panel_memory) {
  uint32_t* strip = static_cast<uint32_t*>(panel_memory);
  const BF16* rhs = static_cast<const BF16*>(term.rhs.data) + n0 * term.rhs.ld;
  for (int64_t c = 0; c < kStrip; c += kLanes) {
    for (int64_t k = 0; k < term.depth; k += 2 * kLanes) {
      transpose_pairs_part(rhs + c * term.rhs.ld + k, term.rhs.ld, cols - c,
                           min64(2 * kLanes, term.depth - k), strip + k / 2 * kStrip + c, kStrip);
    }
  }
}
#endif

// Up to kOuterRows rows of a thin term whose rhs is in the panel.
template <class Outer>
void thin_rows(const GemmTerm& term, int64_t steps, const void* panel, int64_t m0, int64_t rows, int64_t cols,
               bool adds, float* tile) {
  using Value = typename Outer::Value;
  outer_rows<Outer, kOuterRows>(rows, cols, static_cast<const Value*>(term.lhs) + m0 * term.lhs_ld,
                                term.lhs_ld, static_cast<const Value*>(panel), steps, adds, tile, kStrip,
                                no_prefetch(tile));
}

#if PEFT_KERNELS_TILES
// Adds a term of bf16 on tiles: rhs is transposed into a strip of pairs, rows of lhs are used in place. Room
// for a tile of lhs and its sums follows `panel`.
inline void nt_add_term_on_tiles(const GemmTerm& term, int64_t m0, int64_t rows, int64_t n0, int64_t cols,
                                 float* tile, char* panel) {
  constexpr int64_t kTileBytes = kTileDim * (kNtRowBytes + kStrip * sizeof(float));
  static_assert(kNtRowBytes * kStrip <= kNtPanelBytes && kTileBytes <= kGemvScratchBytes, "");
  const Tiles tiles;
  auto* strip = reinterpret_cast<PanelBF16*>(panel);
  float* apart = reinterpret_cast<float*>(panel + kNtPanelBytes);
  auto* copy = reinterpret_cast<PanelBF16*>(apart + kTileDim * kStrip);
  const int64_t block = nt_depth_block(term.depth, sizeof(BF16));
  GemmTerm part = term;
  for (int64_t k0 = 0; k0 < term.depth; k0 += block) {
    part.depth = min64(block, term.depth - k0);
    part.rhs.data = static_cast<const BF16*>(term.rhs.data) + k0;
    nt_fill_thin_pairs(part, n0, cols, strip);
    const int64_t padded = round_up(part.depth, kTileDepth), steps = padded / OuterBF16::kElements;
    const auto* lhs = static_cast<const PanelBF16*>(term.lhs) + m0 * term.lhs_ld + k0;
    float* sums = tile;
    for (int64_t r = 0; r < rows; r += kTileDim, lhs += kTileDim * term.lhs_ld, sums += kTileDim * kStrip) {
      const int64_t height = min64(kTileDim, rows - r);
      if (height == kTileDim && part.depth == padded) {
        OuterBF16::multiply(height, cols, lhs, term.lhs_ld, strip, steps, true, sums, kStrip,
                            no_prefetch(sums));
        continue;
      }
      // Apart, as rows after the last one must not change, not even when rhs holds an Inf.
      memset(copy, 0, kTileDim * padded * sizeof(BF16));
      for (int64_t i = 0; i < height; ++i) {
        memcpy(copy + i * padded, lhs + i * term.lhs_ld, part.depth * sizeof(BF16));
      }
      const size_t kept = height * kStrip * sizeof(float);
      memcpy(apart, sums, kept);
      OuterBF16::multiply(height, cols, copy, padded, strip, steps, true, apart, kStrip, no_prefetch(apart));
      memcpy(sums, apart, kept);
    }
  }
}
#endif

// Calls use(multiply) with what multiplies a few rows of a thin term; returns false if the term is not thin.
template <class Use>
bool with_thin(const GemmTerm& term, int64_t n0, int64_t cols, void* panel, const Use& use) {
#if PEFT_KERNELS_BF16_DOT
  if (is_thin_in_pairs(term)) {
    nt_fill_thin_pairs(term, n0, cols, panel);
    use([&](int64_t m0, int64_t rows, bool adds, float* tile) {
      thin_rows<OuterBF16>(term, term.depth / 2, panel, m0, rows, cols, adds, tile);
    });
    return true;
  }
#endif
  if (!is_thin(term)) return false;
  nt_fill_thin(term, n0, cols, panel);
  use([&](int64_t m0, int64_t rows, bool adds, float* tile) {
    thin_rows<OuterF32>(term, term.depth, panel, m0, rows, cols, adds, tile);
  });
  return true;
}

// `fills_tiles`: the GEMM has enough rows for AMX tiles.
inline void nt_add_term(const GemmTerm& term, int64_t m0, int64_t rows, int64_t n0, int64_t cols, float* tile,
                        void* panel, [[maybe_unused]] bool fills_tiles) {
  const bool was_thin = with_thin(term, n0, cols, panel, [&](const auto& multiply) {
    for (int64_t r = 0; r < rows; r += kOuterRows) {
      multiply(m0 + r, min64(kOuterRows, rows - r), true, tile + r * kStrip);
    }
  });
  if (was_thin) return;
#if PEFT_KERNELS_TILES
  if (fills_tiles && !term.rhs.nf4 && has_bf16_values(term)) {
    return nt_add_term_on_tiles(term, m0, rows, n0, cols, tile, static_cast<char*>(panel));
  }
#endif
  if (has_bf16_values(term)) return nt_add_term<DotBF16>(term, m0, rows, n0, cols, tile, panel);
  with_type(term.lhs_dtype,
            [&](auto type) { nt_add_term<DotF32<decltype(type)>>(term, m0, rows, n0, cols, tile, panel); });
}

// A GEMM of one thin term: each group of rows is finished while its sums are in L1.
inline bool nt_thin(const GemmParams& p, const Rect& rect, int64_t n0, int64_t cols, float* tile,
                    void* panel) {
  if (!is_one_term(p, rect)) return false;
  float start[kStrip];
  const bool starts = start_columns(p, n0, cols, start);
  return with_thin(p.terms[0], n0, cols, panel, [&](const auto& multiply) {
    for (int64_t m = rect.m0; m < rect.m1; m += kOuterRows) {
      const int64_t rows = min64(kOuterRows, rect.m1 - m), next = m + rows;
      prefetch_out(p, next, min64(kOuterRows, rect.m1 - next), n0, cols);
      multiply(m, rows, false, tile);
      finish_tile(p, m, rows, n0, cols, tile, kStrip, starts ? start : nullptr);
    }
  });
}

void gemm_nt(const GemmParams& p, const Rect& rect, void* scratch) {
  float* tile = static_cast<float*>(scratch);
  char* panel = static_cast<char*>(scratch) + kNtTileBytes;
  void* gemv_scratch = panel + kNtPanelBytes;
  const bool gemv = gemv_serves(p), dense_gemv = dense_gemv_serves(p), byte_gemv = byte_gemv_serves(p);
  if (gemv) gemv_arrange_lhs(p.terms[0], rect, gemv_scratch);
  for (int64_t n0 = rect.n0; n0 < rect.n1; n0 += kStrip) {
    const int64_t cols = min64(kStrip, rect.n1 - n0);
    if (nt_thin(p, rect, n0, cols, tile, panel)) continue;
    for (int64_t m0 = rect.m0; m0 < rect.m1; m0 += kNtTileRows) {
      const int64_t rows = min64(kNtTileRows, rect.m1 - m0);
      start_tile(p, m0, rows, n0, cols, tile, kStrip);
      for (int64_t t = 0; t < p.term_count; ++t) {
        const GemmTerm& term = p.terms[t];
        if (t == 0 && gemv) {
          gemv_add_term(term, rows, n0, cols, gemv_scratch, tile);
          continue;
        }
        const int64_t begin = max64(m0, term.m_begin), end = min64(m0 + rows, term.m_end);
        if (begin >= end) continue;
        float* sums = tile + (begin - m0) * kStrip;
        if (t == 0 && byte_gemv) {
          byte_gemv_add_term(term, begin, end - begin, n0, cols, sums);
        } else if (t == 0 && dense_gemv) {
          dense_gemv_add_term(term, begin, end - begin, n0, cols, sums);
        } else {
          nt_add_term(term, begin, end - begin, n0, cols, sums, panel, p.m >= OuterBF16::kTileRows);
        }
      }
      finish_tile(p, m0, rows, n0, cols, tile, kStrip);
    }
  }
}
