// gemm_nt for more than a few rows of lhs. The output is computed transposed, so that decoded rows of rhs are
// used as they are and nothing is summed across lanes:
//
//   one step of a row of rhs (broadcast)   x   packed lhs [step][lane = row m]   ->   tile [n][m]
//
// lhs is packed once per call into strips of kPackRows rows, and these into groups of as many vectors as a
// register tile has: step by step, the rows of the vectors side by side. A step is an fp32 element or a pair
// of bf16, as defined by the unit (linear_packed_units.inl).

constexpr int64_t kPackedBlockRows = 512;  // rows of lhs per decoded row of rhs
constexpr int64_t kPackedMaxCols = 192;    // rows of rhs decoded together
constexpr int64_t kPackedTileFloats = kPackedMaxCols * (kPackedBlockRows + 16);
constexpr int64_t kThinDepthBlock = 64;  // of the terms after the first: the LoRA deltas
constexpr int64_t kPackedScratchBytes = kPackedTileFloats * 4 + kPackedMaxCols * kPackedRowBytes +
                                        kPackedMaxCols * (kThinDepthBlock + kPackRows) * 4 +
                                        kThinDepthBlock * kPackRows * 4;
static_assert(kPackedScratchBytes <= kScratchBytes, "");

// All rows of a panel times `vectors` vectors of a strip, added to the tile or stored there. Rows of zeros
// fill the last register tile. `next` is the following strip, which is prefetched.
template <class Unit, int kVectors>
void packed_strip(int64_t vectors, const typename Unit::Value* panel, int64_t cols,
                  const typename Unit::Step* strip, const typename Unit::Step* next, int64_t steps, bool adds,
                  float* tile, int64_t tile_ld) {
  if constexpr (kVectors > 1) {
    if (vectors < kVectors) {
      return packed_strip<Unit, kVectors - 1>(vectors, panel, cols, strip, next, steps, adds, tile, tile_ld);
    }
  }
  constexpr int64_t kRowLd = kPackedRowBytes / sizeof(*panel), kRows = Unit::template kTileRows<kVectors>;
  const int64_t share = ceil_div(steps * kVectors * kLanes * sizeof(*strip), ceil_div(cols, kRows));
  const char* ahead = reinterpret_cast<const char*>(next);
  for (int64_t c = 0; c < cols; c += kRows, ahead += share) {
    Unit::template multiply<kVectors>(panel + c * kRowLd, strip, steps, adds, tile + c * tile_ld, tile_ld,
                                      ahead, share);
  }
}

// A part of the output: rows [m0, m0 + rows), columns [n0, n0 + cols), in a transposed tile.
struct PackedBlock {
  int64_t m0, rows, n0, cols;
  float* tile;
  int64_t tile_ld;
  // Then the tile is overwritten; lanes past the last vector keep garbage that is never read.
  bool starts_from_zero;
};

// The depth of one pass: a short last pass would load and store the sums for little work.
template <class Unit>
int64_t pass_depth(int64_t depth) {
  constexpr int64_t kUsual = Unit::kUsualDepth;
  const int64_t even = round_up(ceil_div(depth, max64(depth / kUsual, 1)), Unit::kOrder);
  return even <= Unit::kDepth ? even : kUsual;
}

template <class Unit>
void packed_add_first(const GemmParams& p, const PackedBlock& b, void* panel_memory) {
  using Value = typename Unit::Value;
  constexpr int64_t kRowLd = kPackedRowBytes / sizeof(Value);
  static_assert(Unit::kDepth < kRowLd && Unit::kDepth % Unit::kOrder == 0, "");
  Value* panel = static_cast<Value*>(panel_memory);
  const GemmTerm& term = p.terms[0];
  const int64_t padded = round_up(term.depth, Unit::kOrder);
  const int64_t filled = round_up(b.cols, Unit::kGroup);
  constexpr int64_t kRows = Unit::kVectors * kLanes;
  const auto vectors_at = [&](int64_t m) {
    return min64(Unit::kVectors, ceil_div(p.packed_end - b.m0 - m, kLanes));
  };
  const auto strip_at = [&](int64_t m, int64_t k) {
    return static_cast<const typename Unit::Step*>(p.packed_lhs) +
           ((b.m0 + m - p.packed_begin) * padded + k * vectors_at(m) * kLanes) / Unit::kElements;
  };
  const int64_t pass = pass_depth<Unit>(term.depth);
  for (int64_t k0 = 0; k0 < term.depth; k0 += pass) {
    const int64_t depth = min64(pass, term.depth - k0);
    const int64_t steps = round_up(depth, Unit::kOrder) / Unit::kElements;
    for (int64_t c = 0; c < b.cols; ++c) {
      const int64_t first = (b.n0 + c) * term.rhs.ld;
      Unit::fill_row(term.rhs, first + k0, depth, panel + c * kRowLd);
      // Prefetch what the next pass decodes here while this one is multiplied.
      const int64_t next = k0 + pass;
      if (next < term.depth) {
        prefetch_columns(term.rhs, first + next, min64(pass, term.depth - next));
      } else if (b.n0 + c + b.cols < p.n) {
        prefetch_columns(term.rhs, first + b.cols * term.rhs.ld, min64(pass, term.depth));
      }
    }
    for (int64_t c = b.cols; c < filled; ++c)
      memset(panel + c * kRowLd, 0, steps * Unit::kElements * sizeof(Value));
    for (int64_t m = 0; m < b.rows; m += kRows) {
      const bool ends = m + kRows >= b.rows;
      packed_strip<Unit, Unit::kVectors>(vectors_at(m), panel, b.cols, strip_at(m, k0),
                                         ends ? strip_at(0, k0 + pass) : strip_at(m + kRows, k0), steps,
                                         k0 > 0 || !b.starts_from_zero, b.tile + m, b.tile_ld);
    }
  }
}

// Arithmetic of the terms after the first, the LoRA deltas: in fp32, or on pairs of bf16 where both operands
// are bf16. rhs is dense.
struct ThinFloats : OuterF32 {
  using Step = float;
  static void fill_row(const GemmTerm& term, int64_t first, int64_t depth, float* out) {
    fill_panel_row(term.rhs, first, depth, term.rhs_scale, out);
  }
  // kLanes rows of lhs from element `first`, of which `rows` exist.
  static void fill_lanes(const GemmTerm& term, int64_t first, int64_t rows, int64_t depth, float* strip) {
    const float* lhs = static_cast<const float*>(term.lhs) + first;
    for (int64_t k = 0; k < depth; k += kLanes) {
      transpose_part(lhs + k, term.lhs_ld, rows, depth - k, 1.0f, strip + k * kPackRows, kPackRows);
    }
  }
};

#if PEFT_KERNELS_BF16_DOT
struct ThinPairs : OuterBF16 {
  using Step = uint32_t;
  static void fill_row(const GemmTerm& term, int64_t first, int64_t depth, PanelBF16* out) {
    const BF16* rhs = static_cast<const BF16*>(term.rhs.data) + first;
    for (int64_t k = 0; k < depth; k += 2 * kLanes) {
      const bool is_whole = k + 2 * kLanes <= depth;
      store_pairs(out + k, is_whole ? load_pairs(rhs + k) : load_pairs_part(rhs + k, depth - k));
    }
  }
  static void fill_lanes(const GemmTerm& term, int64_t first, int64_t rows, int64_t depth, uint32_t* strip) {
    const BF16* lhs = static_cast<const BF16*>(term.lhs) + first;
    for (int64_t k = 0; k < depth; k += 2 * kLanes) {
      transpose_pairs_part(lhs + k, term.lhs_ld, rows, min64(2 * kLanes, depth - k),
                           strip + k / 2 * kPackRows, kPackRows);
    }
  }
};
#else
using ThinPairs = ThinFloats;
#endif

// Adds such a term to rows [begin, end) of the block.
template <class Thin>
void packed_add_thin(const GemmTerm& term, int64_t begin, int64_t end, const PackedBlock& b, float* scratch) {
  using Value = typename Thin::Value;
  static_assert(kPackRows == kStrip, "");
  Value* rhs = reinterpret_cast<Value*>(scratch);             // [kPackedMaxCols][kThinDepthBlock]
  float* lanes = scratch + kPackedMaxCols * kThinDepthBlock;  // [kThinDepthBlock][kPackRows]
  float* masked_sums = lanes + kThinDepthBlock * kPackRows;   // [kPackedMaxCols][kPackRows]
  auto* strip = reinterpret_cast<typename Thin::Step*>(lanes);
  for (int64_t k0 = 0; k0 < term.depth; k0 += kThinDepthBlock) {
    const int64_t depth = min64(kThinDepthBlock, term.depth - k0);
    for (int64_t c = 0; c < b.cols; ++c) {
      Thin::fill_row(term, (b.n0 + c) * term.rhs.ld + k0, depth, rhs + c * kThinDepthBlock);
    }
    for (int64_t m = begin / kPackRows * kPackRows; m < end; m += kPackRows) {
      const int64_t first = max64(m, begin), last = min64(m + kPackRows, end);
      for (int64_t i = m; i < m + kPackRows; i += kLanes) {
        Thin::fill_lanes(term, (b.m0 + i) * term.lhs_ld + k0, b.rows - i, depth, strip + i - m);
      }
      // Other rows must not change, not even when rhs holds an Inf.
      const bool whole = first == m && (last == m + kPackRows || last == b.rows);
      float* sums = whole ? b.tile + m : masked_sums;
      const int64_t ld = whole ? b.tile_ld : kPackRows;
      if (!whole) memset(masked_sums, 0, b.cols * kPackRows * sizeof(float));
      for (int64_t c = 0; c < b.cols; c += Thin::kTileRows) {
        Thin::multiply(min64(Thin::kTileRows, b.cols - c), kStrip, rhs + c * kThinDepthBlock, kThinDepthBlock,
                       reinterpret_cast<const Value*>(strip),
                       round_up(depth, Thin::kDepthUnit) / Thin::kElements, true, sums + c * ld, ld,
                       no_prefetch(sums));
      }
      if (whole) continue;
      for (int64_t c = 0; c < b.cols; ++c) {
        for (int64_t i = first; i < last; ++i)
          b.tile[c * b.tile_ld + i] += masked_sums[c * kPackRows + i - m];
      }
    }
  }
}

// Loads the output of a block into its tile.
inline void packed_load_out(const GemmParams& p, const PackedBlock& b) {
  with_type(p.out_dtype, [&](auto type) {
    const auto* out = static_cast<const decltype(type)*>(p.out) + b.m0 * p.out_ld + b.n0;
    for (int64_t m = 0; m < b.rows; m += kLanes) {
      for (int64_t n = 0; n < b.cols; n += kLanes) {
        transpose_part(out + m * p.out_ld + n, p.out_ld, b.rows - m, b.cols - n, 1.0f,
                       b.tile + n * b.tile_ld + m, b.tile_ld);
      }
    }
  });
}

template <class T>
void packed_store_out(const GemmParams& p, const PackedBlock& b) {
  for (int64_t m = 0; m < b.rows; m += kLanes) {
    for (int64_t n = 0; n < b.cols; n += kLanes) {
      const int64_t cols = min64(kLanes, b.cols - n);
      Vec block[kLanes];
      for (int i = 0; i < kLanes; ++i) block[i] = i < cols ? load(b.tile + (n + i) * b.tile_ld + m) : zero();
      transpose(block);
      T* out = static_cast<T*>(p.out) + (b.m0 + m) * p.out_ld + b.n0 + n;
      for (int i = 0; i < min64(kLanes, b.rows - m); ++i) store_lanes(out + i * p.out_ld, block[i], cols);
    }
  }
}

template <class Unit>
void packed_start(const GemmParams& p, const PackedBlock& b) {
  if (b.starts_from_zero) return;
  memset(b.tile, 0, round_up(b.cols, Unit::kGroup) * b.tile_ld * sizeof(float));
  if (p.add_to_out) return packed_load_out(p, b);
  if (!p.bias) return;
  for (int64_t c = 0; c < b.cols; ++c) {
    float bias;
    widen_run(p.bias, p.bias_dtype, b.n0 + c, 1, 1.0f, &bias);
    for (int64_t m = 0; m < b.tile_ld; m += kLanes) store(b.tile + c * b.tile_ld + m, splat(bias));
  }
}

template <class Unit>
void gemm_packed(const GemmParams& p, const Rect& rect, void* scratch) {
  float* tile = static_cast<float*>(scratch);
  char* panel = reinterpret_cast<char*>(tile + kPackedTileFloats);
  float* thin = reinterpret_cast<float*>(panel + kPackedMaxCols * kPackedRowBytes);
  for (int64_t m0 = rect.m0; m0 < rect.m1; m0 += kPackedBlockRows) {
    const int64_t rows = min64(kPackedBlockRows, rect.m1 - m0);
    const int64_t tile_ld = round_up(rows, kPackRows) + 16;
    // For a few rows the panel is read as soon as it is written: keep it in L1.
    const int64_t most = kPackedTileFloats / tile_ld / Unit::kGroup * Unit::kGroup;
    const int64_t width = rows <= kPackRows ? Unit::kFewRowsCols : min64(kPackedMaxCols, most);
    for (int64_t n0 = rect.n0; n0 < rect.n1; n0 += width) {
      const bool starts_from_zero = !p.add_to_out && !p.bias;
      const PackedBlock block{m0, rows, n0, min64(width, rect.n1 - n0), tile, tile_ld, starts_from_zero};
      packed_start<Unit>(p, block);
      packed_add_first<Unit>(p, block, panel);
      for (int64_t t = 1; t < p.term_count; ++t) {
        const GemmTerm& term = p.terms[t];
        const int64_t begin = max64(m0, term.m_begin) - m0, end = min64(m0 + rows, term.m_end) - m0;
        if (begin >= end) continue;
        has_bf16_values(term) ? packed_add_thin<ThinPairs>(term, begin, end, block, thin)
                              : packed_add_thin<ThinFloats>(term, begin, end, block, thin);
      }
      with_type(p.out_dtype, [&](auto type) { packed_store_out<decltype(type)>(p, block); });
    }
  }
}

// The lhs of the first term is `p.packed_lhs`; other terms have theirs in fp32, or both operands in bf16.
// `rect` starts at whole strips.
void gemm_packed(const GemmParams& p, const Rect& rect, void* scratch) {
#if PEFT_KERNELS_TILES
  const Tiles tiles;
#endif
  p.plan == NtPlan::kPairs ? gemm_packed<PairsUnit>(p, rect, scratch)
                           : gemm_packed<FloatsUnit>(p, rect, scratch);
}

NtPlan plan_nt(const GemmParams& p) {
  const GemmTerm& term = p.terms[0];
  if (gemv_serves(p) || byte_gemv_serves(p)) return NtPlan::kGemv;
  if (p.n == 0 || term.depth == 0) return NtPlan::kDots;
  if (!term.rhs.nf4 && p.m <= kFewRows) return NtPlan::kDots;
  if (has_bf16_values(term)) return NtPlan::kPairs;
  return FloatsUnit::serves(term) ? NtPlan::kFloats : NtPlan::kDots;
}

template <class Unit>
void pack_strips(const PackParams& p, int64_t begin, int64_t end) {
  const int64_t padded = round_up(p.depth, Unit::kOrder);
  for (int64_t strip = begin; strip < end; ++strip) {
    const int64_t first = strip * kPackRows, vectors = strip_vectors(p.rows - first);
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t side = v % Unit::kVectors, together = min64(vectors - v + side, Unit::kVectors);
      auto* out = static_cast<typename Unit::Step*>(p.out) +
                  (first + (v - side) * kLanes) * padded / Unit::kElements + side * kLanes;
      Unit::pack_vector(p, first + v * kLanes, out, together * kLanes);
    }
  }
}

void pack_strips(const PackParams& p, int64_t begin, int64_t end) {
  p.plan == NtPlan::kPairs ? pack_strips<PairsUnit>(p, begin, end) : pack_strips<FloatsUnit>(p, begin, end);
}
