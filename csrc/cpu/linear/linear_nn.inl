// out[m, n] += lhs[m, p] * rhs[p, n]: GEMMs whose summed dimension runs down the rows of rhs. dx = dy W reads
// rows of the packed weight in their own order, so nothing is transposed.

constexpr int64_t kNnTileRows = 512;  // rows of lhs per decoded panel
constexpr int64_t kNnStrips = 2;      // strips decoded together
constexpr int64_t kNnDepth = 256;     // rows of rhs decoded together
constexpr int64_t kNnTileLd = kNnStrips * kStrip;
// A micro-kernel of whole tiles writes as many rows after the last one of a term.
constexpr int64_t kNnRowsAfter = OuterBF16::kWholeTiles ? OuterBF16::kTileRows - 1 : 0;
constexpr int64_t kNnTileFloats = (kNnTileRows + kNnRowsAfter) * kNnTileLd;
// The same for a single strip, where a longer depth reads rows of lhs contiguously.
constexpr int64_t kNnNarrowFloats = 3 * kNnDepth;
constexpr int64_t kNnPanelFloats = max64(kNnDepth * kNnStrips, kNnNarrowFloats) * kStrip;
constexpr int64_t kNnLhsFloats = 16 * kNnNarrowFloats;  // lhs of one register tile
static_assert((2 * kNnTileFloats + kNnPanelFloats + kNnLhsFloats) * sizeof(float) <= kScratchBytes, "");

// With few rows a panel is used briefly, so it should fit L1. The rows of the whole GEMM decide, not those of
// this task: sums are formed panel by panel, and must not depend on the division into tasks.
template <class Outer>
int64_t nn_depth_block(const GemmParams& p) {
  if (p.m <= 4 * kOuterRows) return 64;
  return p.n > kStrip ? kNnDepth
                      : kNnNarrowFloats * static_cast<int64_t>(sizeof(float) / sizeof(typename Outer::Value));
}

// Passes of about kNnDepth: on tiles a short last one would load and store the sums for little work.
template <class Outer>
int64_t nn_even_depth(int64_t depth) {
  constexpr int64_t kMost = kNnDepth * 5 / 4;
  const int64_t even = round_up(ceil_div(depth, max64(depth / kNnDepth, 1)), Outer::kDepthUnit);
  return even <= kMost ? even : kNnDepth;
}

// Prefetches columns [first, first + cols) of a row of rhs: rows are too far apart for the hardware
// prefetcher.
inline void prefetch_columns(const MatrixView& rhs, int64_t first, int64_t cols) {
  const char* at = static_cast<const char*>(rhs.data) + first * element_bytes(rhs.dtype);
  int64_t bytes = cols * element_bytes(rhs.dtype);
  if (rhs.nf4) {
    const int shift = rhs.nf4->codes ? 1 : 0;  // two codes a byte
    at = reinterpret_cast<const char*>(rhs.nf4->packed) + (first >> shift);
    bytes = cols >> shift;
  }
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(at + i);
}

// Rows [p0, p0 + depth) and columns [n0, n0 + cols) of rhs, as a panel.
template <class Outer>
struct NnPanel {
  using Value = typename Outer::Value;
  const GemmTerm& term;
  int64_t n0, cols;
  Value *panel, *packed;  // packed: buffer for the lhs of a register tile
  int64_t p0 = 0, depth = 0, padded = 0;

  // Prefetches meanwhile, `ahead` rows of rhs further on.
  void fill(int64_t from, int64_t rows, int64_t ahead) {
    p0 = from;
    depth = rows;
    padded = round_up(depth, Outer::kDepthUnit);
    if (Outer::fill_dense(term.rhs, term.rhs_scale, p0 * term.rhs.ld + n0, depth, cols, panel)) return;
    for (int64_t p = 0; p < padded; p += Outer::kElements) {
      for (int64_t c = 0; c < cols; c += kStrip) {
        Outer::fill_step(term.rhs, term.rhs_scale, (p0 + p) * term.rhs.ld + n0 + c,
                         max64(0, min64(Outer::kElements, depth - p)), min64(kStrip, cols - c),
                         panel + c * padded + p * kStrip);
      }
      for (int64_t next = p0 + p + ahead, end = next + Outer::kElements; next < min64(end, term.depth);
           ++next) {
        prefetch_columns(term.rhs, next * term.rhs.ld + n0, cols);
      }
    }
  }

  // tile += rows [m0, m0 + rows) of lhs, at most a register tile, times the panel.
  void multiply(int64_t m0, int64_t rows, bool adds, float* tile, Prefetch fetch, int64_t strip_bytes = 0) {
    int64_t lhs_ld = term.lhs_ld;
    const Value* lhs = Outer::direct_lhs(term, m0 * lhs_ld + p0);
    if (!lhs || depth < padded || (Outer::kWholeTiles && rows < Outer::kTileRows)) {
      lhs_ld = padded;
      lhs = packed;
      for (int64_t i = 0; i < rows; ++i) {
        Outer::pack_lhs(term.lhs, term.lhs_dtype, (m0 + i) * term.lhs_ld + p0, depth, packed + i * padded);
        if (depth < padded) memset(packed + i * padded + depth, 0, (padded - depth) * sizeof(Value));
      }
    }
    for (int64_t c = 0; c < cols; c += kStrip) {
      Outer::multiply(rows, cols - c, lhs, lhs_ld, panel + c * padded, padded / Outer::kElements, adds,
                      tile + c, kNnTileLd, fetch);
      fetch.at += strip_bytes;
    }
  }

  // Prefetches the rows of lhs after the register tile at m0.
  Prefetch next_lhs(int64_t m0) const {
    const int64_t row_bytes = term.lhs_ld * element_bytes(term.lhs_dtype);
    return {static_cast<const char*>(term.lhs) + (m0 + Outer::kTileRows) * row_bytes,
            Outer::kTileRows * row_bytes / (padded / Outer::kElements)};
  }
};

// Which part of the next panel, starting at element `first`, register tile `index` of this panel prefetches:
// one cache line per step; none once all are done.
template <class Outer>
Prefetch next_rhs(const MatrixView& rhs, int64_t first, int64_t index, const void* near) {
  const int64_t size = element_bytes(rhs.dtype), lines = kStrip * size / 64;
  if (rhs.nf4 || index >= lines * Outer::kElements) return no_prefetch(near);
  return {static_cast<const char*>(rhs.data) + (first + index / lines * rhs.ld) * size + index % lines * 64,
          Outer::kElements * rhs.ld * size};
}

// `next`: the rhs of the following term, or null.
template <class Outer>
void nn_add_term(const GemmTerm& term, const MatrixView* next, int64_t depth_block, int64_t m0, int64_t rows,
                 int64_t n0, int64_t cols, bool adds, float* tile, void* panel_memory, void* lhs_memory) {
  using Value = typename Outer::Value;
  NnPanel<Outer> panel{term, n0, cols, static_cast<Value*>(panel_memory), static_cast<Value*>(lhs_memory)};
  if (Outer::kWholeTiles && depth_block == kNnDepth) depth_block = nn_even_depth<Outer>(term.depth);
  for (int64_t p0 = 0; p0 < term.depth; p0 += depth_block, adds = true) {
    panel.fill(p0, min64(depth_block, term.depth - p0), depth_block);
    const int64_t end = p0 + panel.depth;
    const MatrixView* after = end < term.depth ? &term.rhs : next;
    const int64_t first = (end < term.depth ? end * term.rhs.ld : 0) + n0;
    for (int64_t r = 0; r < rows; r += Outer::kTileRows) {
      const Prefetch fetch = after ? next_rhs<Outer>(*after, first, r / Outer::kTileRows, panel_memory)
                                   : no_prefetch(panel_memory);
      panel.multiply(m0 + r, min64(Outer::kTileRows, rows - r), adds, tile + r * kNnTileLd, fetch,
                     fetch.stride ? kStrip * element_bytes(after->dtype) : 0);
    }
  }
}

// The same when the panel holds all of rhs: each register tile is finished while its sums are in L1.
template <class Outer>
void nn_thin(const GemmParams& p, const Rect& rect, int64_t n0, int64_t cols, const float* start, float* tile,
             void* panel_memory, void* lhs_memory) {
  using Value = typename Outer::Value;
  NnPanel<Outer> panel{p.terms[0], n0, cols, static_cast<Value*>(panel_memory),
                       static_cast<Value*>(lhs_memory)};
  panel.fill(0, panel.term.depth, panel.term.depth);
  for (int64_t m = rect.m0; m < rect.m1; m += Outer::kTileRows) {
    const int64_t rows = min64(Outer::kTileRows, rect.m1 - m), next = m + rows;
    prefetch_out(p, next, min64(Outer::kTileRows, rect.m1 - next), n0, cols);
    panel.multiply(m, rows, false, tile, n0 == rect.n0 && next < p.m ? panel.next_lhs(m) : no_prefetch(tile));
    finish_tile(p, m, rows, n0, cols, tile, kNnTileLd, start);
  }
}

// Calls use with the micro-kernel of a term.
template <class Use>
void with_outer(const GemmTerm& term, const Use& use) {
  has_bf16_values(term) ? use(OuterBF16{}) : use(OuterF32{});
}

void gemm_nn(const GemmParams& p, const Rect& rect, void* scratch) {
#if PEFT_KERNELS_TILES
  const Tiles tiles;
#endif
  float* tile = static_cast<float*>(scratch);
  float* panel = tile + kNnTileFloats;
  float* lhs = panel + kNnPanelFloats;
  float* masked = lhs + kNnLhsFloats;  // of a term with dropout, before the mask; or rows to put back
  const bool is_one = is_one_term(p, rect);
  const auto add_term = [&](int64_t t, int64_t m0, int64_t rows, int64_t n0, int64_t cols, bool adds,
                            float* sums) {
    const MatrixView* next = t + 1 < p.term_count ? &p.terms[t + 1].rhs : nullptr;
    with_outer(p.terms[t], [&](auto outer) {
      using Outer = decltype(outer);
      nn_add_term<Outer>(p.terms[t], next, nn_depth_block<Outer>(p), m0, rows, n0, cols, adds, sums, panel,
                         lhs);
    });
  };
  for (int64_t n0 = rect.n0; n0 < rect.n1; n0 += kNnTileLd) {
    const int64_t cols = min64(kNnTileLd, rect.n1 - n0);
    float columns[kNnTileLd];
    const float* start = is_one && start_columns(p, n0, cols, columns) ? columns : nullptr;
    bool is_done = false;
    if (is_one) {
      with_outer(p.terms[0], [&](auto outer) {
        using Outer = decltype(outer);
        is_done = p.terms[0].depth <= nn_depth_block<Outer>(p);
        if (is_done) nn_thin<Outer>(p, rect, n0, cols, start, tile, panel, lhs);
      });
    }
    if (is_done) continue;
    for (int64_t m0 = rect.m0; m0 < rect.m1; m0 += kNnTileRows) {
      const int64_t rows = min64(kNnTileRows, rect.m1 - m0);
      if (is_one) {
        add_term(0, m0, rows, n0, cols, false, tile);
        finish_tile(p, m0, rows, n0, cols, tile, kNnTileLd, start);
        continue;
      }
      // Storing the first term saves filling the sums with zeros and adding to them.
      const bool first_starts = !p.add_to_out && !p.bias && first_term_covers(p, m0, m0 + rows);
      if (!first_starts) start_tile(p, m0, rows, n0, cols, tile, kNnTileLd);
      for (int64_t t = 0; t < p.term_count; ++t) {
        const GemmTerm& term = p.terms[t];
        const int64_t begin = max64(m0, term.m_begin), end = min64(m0 + rows, term.m_end);
        if (begin >= end) continue;
        float* sums = tile + (begin - m0) * kNnTileLd;
        if (term.mask.threshold == 0) {
          // Whole tiles also write the rows after a term's last one, which are other terms': put them back.
          float* after = tile + (end - m0) * kNnTileLd;
          const size_t kept = min64(kNnRowsAfter, m0 + rows - end) * kNnTileLd * sizeof(float);
          memcpy(masked, after, kept);
          add_term(t, begin, end - begin, n0, cols, t > 0 || !first_starts, sums);
          memcpy(after, masked, kept);
          continue;
        }
        if (term.depth == 0) continue;
        add_term(t, begin, end - begin, n0, cols, false, masked);
        for (int64_t m = begin; m < end; ++m) {
          const int64_t row = (m - begin) * kNnTileLd;
          add_kept(term.mask, m * term.mask.ld + n0, cols, masked + row, sums + row);
        }
      }
      finish_tile(p, m0, rows, n0, cols, tile, kNnTileLd);
    }
  }
}
