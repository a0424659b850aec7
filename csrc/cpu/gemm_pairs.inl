// gemm_nt on pairs of bf16, for more than a few rows of lhs. It is computed transposed, so that rows of rhs
// serve as they are decoded, and no sums run across lanes:
//
//   pair k, k + 1 of one row of rhs (broadcast)   x   packed lhs [k / 2][lane = row m]   ->   tile [n][m]
//
// lhs is packed once per call, in strips of kPackRows rows: pair by pair, the rows of the strip side by side.

constexpr int64_t kPairsDepth = 256;  // of one pass: a strip of lhs that long takes two thirds of L1
constexpr int64_t kPairsRowLd = kPairsDepth + 32;  // keeps decoded rows out of each other's cache sets
constexpr int64_t kPairsBlockRows = 512;           // rows of lhs that one decoded row of rhs serves
constexpr int64_t kPairsMaxCols = 192;             // rows of rhs decoded together
constexpr int64_t kPairsFewRowsCols = PEFT_KERNELS_TILES ? 64 : 48;  // the same where lhs is one strip
constexpr int64_t kPairsTileFloats = 192 * (kPairsBlockRows + 16);
constexpr int64_t kThinDepthBlock = 64;  // of fp32 terms: the LoRA deltas
constexpr int64_t kPairsScratchBytes =
    kPairsTileFloats * 4 + kPairsMaxCols * (kPairsRowLd * 2 + kThinDepthBlock * 4 + kPackRows * 4) +
    kThinDepthBlock * kPackRows * 4;
static_assert(kPairsScratchBytes <= kScratchBytes, "");

// The first of `vectors` vectors of a strip; the others follow.
inline int64_t strip_vectors(int64_t rows) { return (min64(rows, kPackRows) + kLanes - 1) / kLanes; }

// The first `count` of kPackDepth elements, the others zero.
inline EvenOdd load_even_odd(const void* p, int64_t count) {
  const BF16* x = static_cast<const BF16*>(p);
  constexpr int64_t kHalf = kPackDepth / 2;
  if (count >= kPackDepth) return even_odd(load_pairs(x), load_pairs(x + kHalf));
  if (count >= kHalf) return even_odd(load_pairs(x), load_pairs_part(x + kHalf, count - kHalf));
  return even_odd(load_pairs_part(x, count), load_pairs_part(x, 0));
}

void pack_pairs(const PackParams& p, int64_t begin, int64_t end) {
  const int64_t padded = round_up(p.depth, kPackDepth);
  for (int64_t strip = begin; strip < end; ++strip) {
    const int64_t first = strip * kPackRows, vectors = strip_vectors(p.rows - first);
    uint32_t* out = static_cast<uint32_t*>(p.out) + first * padded / 2;
    for (int64_t v = 0; v < vectors; ++v) {
      const BF16* x = static_cast<const BF16*>(p.x) + (first + v * kLanes) * p.depth;
      const int64_t rows = min64(kLanes, p.rows - first - v * kLanes);
      for (int64_t k = 0; k < p.depth; k += kPackDepth) {
        Vec even[kLanes], odd[kLanes];
        for (int r = 0; r < kLanes; ++r) {
          const EvenOdd row = load_even_odd(x + r * p.depth + k, r < rows ? p.depth - k : 0);
          even[r] = as_floats(row.even);
          odd[r] = as_floats(row.odd);
        }
        transpose(even);
        transpose(odd);
        const int64_t ld = vectors * kLanes;
        uint32_t* to = out + k / 2 * ld + v * kLanes;
        for (int r = 0; r < kLanes; ++r) {
          store_bits(to + r * ld, even[r]);
          store_bits(to + (kLanes + r) * ld, odd[r]);
        }
      }
    }
  }
}

// `count` elements of rhs from element `first`, in the order of pack_pairs, padded with zeros.
inline void fill_pairs_row(const MatrixView& rhs, int64_t first, int64_t count, PanelBF16* out) {
  const auto store_step = [](const void* natural, int64_t left, PanelBF16* to) {
    const EvenOdd step = load_even_odd(natural, left);
    store_pairs(to, step.even);
    store_pairs(to + kPackDepth / 2, step.odd);
  };
  if (!rhs.nf4) {
    const BF16* row = static_cast<const BF16*>(rhs.data) + first;
    for (int64_t i = 0; i < count; i += kPackDepth) store_step(row + i, count - i, out + i);
    return;
  }
  const Nf4View w = *rhs.nf4;  // a copy, which stores to out cannot change
  int64_t i = 0;
  if (first % kPackDepth == 0 && w.block_shift >= 6) {
    const int64_t whole = count / kPackDepth * kPackDepth;
    const uint8_t* bytes = w.packed + first / 2;
    // A table a step, even where a block is longer: without a loop over blocks the steps overlap.
#pragma GCC unroll 4
    for (; i < whole; i += kPackDepth) {
      const EvenOddTable table(block_absmax(w, (first + i) >> w.block_shift));
      table.decode(bytes + i / 2, out + i);
    }
  }
  for (; i < count; i += kPackDepth) {  // unaligned, or the end of a row
    PanelBF16 natural[kPackDepth];
    const int64_t left = min64(kPackDepth, count - i);
    dequantize_run(w, first + i, left, natural);
    store_step(natural, left, out + i);
  }
}

// tile[r][lane] += the sum over pairs of rhs[r] * strip[lane], kVectors vectors of lanes.
#if PEFT_KERNELS_TILES
constexpr int64_t kPairsGroup = 64;  // a multiple of every kPairsTileRows
template <int kVectors>
constexpr int kPairsTileRows = kTileDim * (4 / kVectors);

template <int kVectors>
inline void pairs_tile(const PanelBF16* rhs, const uint32_t* strip, int64_t steps, float* tile,
                       int64_t tile_ld) {
  tiles_block<4 / kVectors, kVectors>(rhs, kPairsRowLd * sizeof(PanelBF16), strip, 2 * steps / kTileDepth,
                                      tile, tile_ld);
}
#else
constexpr int64_t kPairsGroup = 24;
template <int kVectors>
constexpr int kPairsTileRows = 24 / kVectors;

template <int kVectors>
void pairs_tile(const PanelBF16* rhs, const uint32_t* strip, int64_t steps, float* tile, int64_t tile_ld) {
  constexpr int kRows = kPairsTileRows<kVectors>;
  Vec sums[kRows][kVectors];
#  pragma GCC unroll 24
  for (int r = 0; r < kRows; ++r) {
#  pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[r][v] = zero();
  }
  for (int64_t s = 0; s < steps; ++s, rhs += 2, strip += kVectors * kLanes) {
    VecPairs x[kVectors];
#  pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) x[v] = load_pairs(strip + v * kLanes);
#  pragma GCC unroll 24
    for (int r = 0; r < kRows; ++r) {
      const VecPairs w = splat_pair(rhs + r * kPairsRowLd);
#  pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[r][v] = dot_pairs(x[v], w, sums[r][v]);
    }
  }
#  pragma GCC unroll 24
  for (int r = 0; r < kRows; ++r) {
#  pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      float* out = tile + r * tile_ld + v * kLanes;
      store(out, add(load(out), sums[r][v]));
    }
  }
}
#endif

// All rows of a panel against one strip. Rows of zeros fill the last register tile.
template <int kVectors>
void pairs_strip(const PanelBF16* panel, int64_t cols, const uint32_t* strip, int64_t steps, float* tile,
                 int64_t tile_ld) {
  for (int64_t c = 0; c < cols; c += kPairsTileRows<kVectors>) {
    pairs_tile<kVectors>(panel + c * kPairsRowLd, strip, steps, tile + c * tile_ld, tile_ld);
  }
}

// A part of the output: rows [m0, m0 + rows), columns [n0, n0 + cols), in a tile that is its transpose.
struct PairsBlock {
  int64_t m0, rows, n0, cols;
  float* tile;
  int64_t tile_ld;
};

void pairs_add_packed(const GemmParams& p, const PairsBlock& b, PanelBF16* panel) {
  const GemmTerm& term = p.terms[0];
  const int64_t padded = round_up(term.depth, kPackDepth);
  const int64_t filled = round_up(b.cols, kPairsGroup);
  for (int64_t k0 = 0; k0 < term.depth; k0 += kPairsDepth) {
    const int64_t depth = min64(kPairsDepth, term.depth - k0), steps = round_up(depth, kPackDepth) / 2;
    for (int64_t c = 0; c < b.cols; ++c) {
      PanelBF16* row = panel + c * kPairsRowLd;
      const int64_t first = (b.n0 + c) * term.rhs.ld;
      fill_pairs_row(term.rhs, first + k0, depth, row);
      // What the next pass decodes here arrives while this one is multiplied.
      const int64_t next = k0 + kPairsDepth;
      if (next < term.depth) {
        prefetch_columns(term.rhs, first + next, min64(kPairsDepth, term.depth - next));
      } else if (b.n0 + c + b.cols < p.n) {
        prefetch_columns(term.rhs, first + b.cols * term.rhs.ld, min64(kPairsDepth, term.depth));
      }
    }
    for (int64_t c = b.cols; c < filled; ++c)
      memset(panel + c * kPairsRowLd, 0, steps * 2 * sizeof(PanelBF16));
    for (int64_t m = 0; m < b.rows; m += kPackRows) {
      const int64_t vectors = strip_vectors(p.packed_end - b.m0 - m);
      const uint32_t* strip = static_cast<const uint32_t*>(p.packed_lhs) +
                              (b.m0 + m - p.packed_begin) * padded / 2 + k0 / 2 * vectors * kLanes;
      float* tile = b.tile + m;
      switch (vectors) {
        case 1:
          pairs_strip<1>(panel, b.cols, strip, steps, tile, b.tile_ld);
          break;
        case 2:
          pairs_strip<2>(panel, b.cols, strip, steps, tile, b.tile_ld);
          break;
        case 3:
          pairs_strip<3>(panel, b.cols, strip, steps, tile, b.tile_ld);
          break;
        default:
          pairs_strip<4>(panel, b.cols, strip, steps, tile, b.tile_ld);
      }
    }
  }
}

// A term with lhs in fp32 and rhs dense, a LoRA delta: fp32 arithmetic, in rows [begin, end) of the block.
void pairs_add_thin(const GemmTerm& term, int64_t begin, int64_t end, const PairsBlock& b, float* scratch) {
  float* rhs = scratch;                                  // [kPairsMaxCols][kThinDepthBlock]
  float* strip = rhs + kPairsMaxCols * kThinDepthBlock;  // [kThinDepthBlock][kPackRows]
  float* apart = strip + kThinDepthBlock * kPackRows;    // [kPairsMaxCols][kPackRows]
  for (int64_t k0 = 0; k0 < term.depth; k0 += kThinDepthBlock) {
    const int64_t depth = min64(kThinDepthBlock, term.depth - k0);
    for (int64_t c = 0; c < b.cols; ++c) {
      fill_panel_row(term.rhs, (b.n0 + c) * term.rhs.ld + k0, depth, term.rhs_scale,
                     rhs + c * kThinDepthBlock);
    }
    for (int64_t m = begin / kPackRows * kPackRows; m < end; m += kPackRows) {
      const int64_t first = max64(m, begin), last = min64(m + kPackRows, end);
      const float* lhs = static_cast<const float*>(term.lhs) + b.m0 * term.lhs_ld + k0;
      for (int64_t i = m; i < m + kPackRows; i += kLanes) {
        for (int64_t k = 0; k < depth; k += kLanes) {
          Vec rows[kLanes];
          for (int r = 0; r < kLanes; ++r) {
            const bool there = i + r >= first && i + r < last;
            rows[r] = there ? load_lanes(lhs + (i + r) * term.lhs_ld + k, min64(kLanes, depth - k)) : zero();
          }
          transpose(rows);
          for (int r = 0; r < min64(kLanes, depth - k); ++r)
            store(strip + (k + r) * kPackRows + i - m, rows[r]);
        }
      }
      // Other rows must not change, not even when rhs holds an Inf.
      const bool whole = first == m && (last == m + kPackRows || last == b.rows);
      float* sums = whole ? b.tile + m : apart;
      const int64_t ld = whole ? b.tile_ld : kPackRows;
      if (!whole) memset(apart, 0, b.cols * kPackRows * sizeof(float));
      for (int64_t c = 0; c < b.cols; c += kOuterRows) {
        outer_rows<OuterF32, kOuterRows>(min64(kOuterRows, b.cols - c), rhs + c * kThinDepthBlock,
                                         kThinDepthBlock, strip, depth, sums + c * ld, ld);
      }
      if (whole) continue;
      for (int64_t c = 0; c < b.cols; ++c) {
        for (int64_t i = first; i < last; ++i) b.tile[c * b.tile_ld + i] += apart[c * kPackRows + i - m];
      }
    }
  }
}

template <class T>
void pairs_load_out(const GemmParams& p, const PairsBlock& b) {
  for (int64_t m = 0; m < b.rows; m += kLanes) {
    for (int64_t n = 0; n < b.cols; n += kLanes) {
      Vec block[kLanes];
      for (int i = 0; i < kLanes; ++i) {
        const T* out = static_cast<const T*>(p.out) + (b.m0 + m + i) * p.out_ld + b.n0 + n;
        block[i] = m + i < b.rows ? load_lanes(out, min64(kLanes, b.cols - n)) : zero();
      }
      transpose(block);
      for (int i = 0; i < min64(kLanes, b.cols - n); ++i) store(b.tile + (n + i) * b.tile_ld + m, block[i]);
    }
  }
}

template <class T>
void pairs_store_out(const GemmParams& p, const PairsBlock& b) {
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

inline void pairs_start(const GemmParams& p, const PairsBlock& b) {
  const int64_t row_bytes = b.tile_ld * sizeof(float);
  memset(b.tile, 0, round_up(b.cols, kPairsGroup) * row_bytes);
  if (p.add_to_out) {
    if (p.out_dtype == DType::kBF16) return pairs_load_out<BF16>(p, b);
    return pairs_load_out<float>(p, b);
  }
  if (!p.bias) return;
  for (int64_t c = 0; c < b.cols; ++c) {
    float bias;
    widen_run(p.bias, p.bias_dtype, b.n0 + c, 1, 1.0f, &bias);
    for (int64_t m = 0; m < b.tile_ld; m += kLanes) store(b.tile + c * b.tile_ld + m, splat(bias));
  }
}

bool pairs_serve(const GemmParams& p) {
  return p.m > kFewRows && p.n > 0 && p.terms[0].depth > 0 && p.out_dtype != DType::kF16 &&
         has_bf16_values(p.terms[0]);
}

// The first term has `p.packed_lhs` for its lhs; others have theirs in fp32. `rect` starts at whole strips.
void gemm_pairs(const GemmParams& p, const Rect& rect, void* scratch) {
#if PEFT_KERNELS_TILES
  const Tiles tiles;
#endif
  float* tile = static_cast<float*>(scratch);
  PanelBF16* panel = reinterpret_cast<PanelBF16*>(tile + kPairsTileFloats);
  float* thin = reinterpret_cast<float*>(panel + kPairsMaxCols * kPairsRowLd);
  for (int64_t m0 = rect.m0; m0 < rect.m1; m0 += kPairsBlockRows) {
    const int64_t rows = min64(kPairsBlockRows, rect.m1 - m0);
    const int64_t tile_ld = round_up(rows, kPackRows) + 16;
    // For a few rows the panel is read as soon as it is written: keep it in L1.
    const int64_t width = rows <= kPackRows
                              ? kPairsFewRowsCols
                              : min64(kPairsMaxCols, kPairsTileFloats / tile_ld / kPairsGroup * kPairsGroup);
    for (int64_t n0 = rect.n0; n0 < rect.n1; n0 += width) {
      const PairsBlock block{m0, rows, n0, min64(width, rect.n1 - n0), tile, tile_ld};
      pairs_start(p, block);
      pairs_add_packed(p, block, panel);
      for (int64_t t = 1; t < p.term_count; ++t) {
        const GemmTerm& term = p.terms[t];
        const int64_t begin = max64(m0, term.m_begin) - m0, end = min64(m0 + rows, term.m_end) - m0;
        if (begin < end) pairs_add_thin(term, begin, end, block, thin);
      }
      if (p.out_dtype == DType::kBF16) {
        pairs_store_out<BF16>(p, block);
      } else {
        pairs_store_out<float>(p, block);
      }
    }
  }
}
