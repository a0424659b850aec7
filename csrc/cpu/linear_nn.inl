// out[m, n] += lhs[m, p] * rhs[p, n]: products whose summed dimension runs down the rows of rhs. dx = dy W
// reads rows of the packed weight in their own order, so nothing is transposed here either.

constexpr int64_t kNnTileRows = 512;  // of lhs, that one decoded panel serves
constexpr int64_t kNnStrips = 2;      // strips decoded together
constexpr int64_t kNnDepth = 256;     // rows of rhs decoded together
constexpr int64_t kNnTileLd = kNnStrips * kStrip;
constexpr int64_t kNnTileFloats = kNnTileRows * kNnTileLd;
constexpr int64_t kNnPanelFloats = kNnDepth * kNnStrips * kStrip;
constexpr int64_t kNnLhsFloats = 16 * kNnDepth;  // of the rows in a register tile
static_assert((2 * kNnTileFloats + kNnPanelFloats + kNnLhsFloats) * sizeof(float) <= kScratchBytes, "");

// With few rows a panel is soon done with: it should fit L1. Rows of the whole product count, not of this
// task: sums are made panel by panel, and must not depend on how the work is cut.
inline int64_t nn_depth_block(int64_t rows) { return rows <= 4 * kOuterRows ? 64 : kNnDepth; }

// Columns [first, first + cols) of a row of rhs, asked for before they are wanted: rows lie far apart, and no
// hardware foresees the next.
inline void prefetch_columns(const MatrixView& rhs, int64_t first, int64_t cols) {
  const char* at = rhs.nf4 ? reinterpret_cast<const char*>(rhs.nf4->packed) + first / 2
                           : static_cast<const char*>(rhs.data) + first * element_bytes(rhs.dtype);
  const int64_t bytes = rhs.nf4 ? cols / 2 : cols * element_bytes(rhs.dtype);
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i);
}

template <class Outer>
void nn_add_term(const GemmTerm& term, int64_t depth_block, int64_t m0, int64_t rows, int64_t n0,
                 int64_t cols, float* tile, void* panel_memory, void* lhs_memory) {
  using Value = typename Outer::Value;
  Value* panel = static_cast<Value*>(panel_memory);
  Value* packed = static_cast<Value*>(lhs_memory);
  for (int64_t p0 = 0; p0 < term.depth; p0 += depth_block) {
    const int64_t depth = min64(depth_block, term.depth - p0);
    const int64_t padded = round_up(depth, Outer::kDepthUnit), steps = padded / Outer::kElements;
    const bool filled =
        Outer::fill_dense(term.rhs, term.rhs_scale, p0 * term.rhs.ld + n0, depth, cols, panel);
    for (int64_t p = 0; p < padded && !filled; p += Outer::kElements) {
      for (int64_t c = 0; c < cols; c += kStrip) {
        Outer::fill_step(term.rhs, term.rhs_scale, (p0 + p) * term.rhs.ld + n0 + c,
                         max64(0, min64(Outer::kElements, depth - p)), min64(kStrip, cols - c),
                         panel + c * padded + p * kStrip);
      }
      for (int64_t next = p0 + p + depth_block, end = next + Outer::kElements; next < min64(end, term.depth);
           ++next) {
        prefetch_columns(term.rhs, next * term.rhs.ld + n0, cols);
      }
    }
    for (int64_t r = 0; r < rows; r += Outer::kTileRows) {
      const int64_t count = min64(Outer::kTileRows, rows - r);
      int64_t lhs_ld = term.lhs_ld;
      const Value* lhs = Outer::direct_lhs(term, (m0 + r) * lhs_ld + p0);
      if (!lhs || depth < padded || (Outer::kWholeTiles && count < Outer::kTileRows)) {
        lhs_ld = padded;
        lhs = packed;
        for (int64_t i = 0; i < count; ++i) {
          Outer::pack_lhs(term.lhs, term.lhs_dtype, (m0 + r + i) * term.lhs_ld + p0, depth,
                          packed + i * padded);
          if (depth < padded) memset(packed + i * padded + depth, 0, (padded - depth) * sizeof(Value));
        }
      }
      for (int64_t c = 0; c < cols; c += kStrip) {
        Outer::multiply(count, lhs, lhs_ld, panel + c * padded, steps, tile + r * kNnTileLd + c, kNnTileLd);
      }
    }
  }
}

inline void nn_add_term(const GemmTerm& term, int64_t depth_block, int64_t m0, int64_t rows, int64_t n0,
                        int64_t cols, float* tile, void* panel, void* lhs) {
  has_bf16_values(term) ? nn_add_term<OuterBF16>(term, depth_block, m0, rows, n0, cols, tile, panel, lhs)
                        : nn_add_term<OuterF32>(term, depth_block, m0, rows, n0, cols, tile, panel, lhs);
}

void gemm_nn(const GemmParams& p, const Rect& rect, void* scratch) {
#if PEFT_KERNELS_TILES
  const Tiles tiles;
#endif
  float* tile = static_cast<float*>(scratch);
  float* panel = tile + kNnTileFloats;
  float* lhs = panel + kNnPanelFloats;
  float* masked = lhs + kNnLhsFloats;  // the product of a term with dropout
  const int64_t depth_block = nn_depth_block(p.m);
  for (int64_t n0 = rect.n0; n0 < rect.n1; n0 += kNnTileLd) {
    const int64_t cols = min64(kNnTileLd, rect.n1 - n0);
    for (int64_t m0 = rect.m0; m0 < rect.m1; m0 += kNnTileRows) {
      const int64_t rows = min64(kNnTileRows, rect.m1 - m0);
      start_tile(p, m0, rows, n0, cols, tile, kNnTileLd);
      for (int64_t t = 0; t < p.term_count; ++t) {
        const GemmTerm& term = p.terms[t];
        const int64_t begin = max64(m0, term.m_begin), end = min64(m0 + rows, term.m_end);
        if (begin >= end) continue;
        float* sums = tile + (begin - m0) * kNnTileLd;
        if (term.mask.threshold == 0) {
          nn_add_term(term, depth_block, begin, end - begin, n0, cols, sums, panel, lhs);
          continue;
        }
        memset(masked, 0, (end - begin) * kNnTileLd * sizeof(float));
        nn_add_term(term, depth_block, begin, end - begin, n0, cols, masked, panel, lhs);
        for (int64_t m = begin; m < end; ++m) {
          const int64_t row = (m - begin) * kNnTileLd;
          add_kept(term.mask, m * term.mask.ld + n0, cols, masked + row, sums + row);
        }
      }
      finish_tile(p, m0, rows, n0, cols, tile, kNnTileLd);
    }
  }
}
