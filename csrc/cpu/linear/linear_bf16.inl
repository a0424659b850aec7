// The dot and outer-product micro-kernels on pairs of bf16. The weight is rounded to bf16, as dequantising it
// to the activations' dtype does; sums are fp32.

inline void fill_panel_row(const MatrixView& rhs, int64_t first, int64_t count, float, PanelBF16* out) {
  if (rhs.nf4) {
    dequantize_run(*rhs.nf4, first, count, out);
  } else {
    memcpy(out, static_cast<const BF16*>(rhs.data) + first, count * sizeof(BF16));
  }
}

// Depth that is multiplied at once.
#if PEFT_KERNELS_TILES
constexpr int kPairsDepthUnit = kTileDepth;
#else
constexpr int kPairsDepthUnit = 2;
#endif

// The first `rows` of kLanes rows of `count` <= 2 * kLanes elements, transposed as pairs. Missing rows, and
// elements up to a multiple of kPairsDepthUnit, become zeros.
inline void transpose_pairs_part(const BF16* x, int64_t ld, int64_t rows, int64_t count, uint32_t* out,
                                 int64_t out_ld) {
  Vec block[kLanes];
  for (int r = 0; r < kLanes; ++r) {
    block[r] = r >= rows             ? zero()
               : count == 2 * kLanes ? as_floats(load_pairs(x + r * ld))
                                     : as_floats(load_pairs_part(x + r * ld, count));
  }
  transpose(block);
  for (int s = 0; s < round_up(count, kPairsDepthUnit) / 2; ++s) store_bits(out + s * out_ld, block[s]);
}

// Pairs along the summed dimension are already adjacent.
struct DotBF16 : PairSteps {
  using Lhs = BF16;
  static constexpr int kStep = 2 * kLanes;
  static VecPairs load_lhs(const BF16* p) { return load_pairs(p); }
  static VecPairs load_lhs_part(const BF16* p, int64_t count) { return load_pairs_part(p, count); }
};

// Rows p and p + 1 of rhs are interleaved while the panel is filled.
struct OuterBF16 : PairSteps {
  static constexpr int64_t kChain = 128;
  static constexpr bool kWholeTiles = PEFT_KERNELS_TILES;
  static constexpr int kDepthUnit = kPairsDepthUnit;
#if PEFT_KERNELS_TILES
  static constexpr int kTileRows = kTileDim;
  static void multiply(int64_t, int64_t cols, const PanelBF16* lhs, int64_t lhs_ld, const PanelBF16* strip,
                       int64_t steps, bool adds, float* tile, int64_t tile_ld, Prefetch) {
    multiply_vectors<kStrip / kTileDim>(ceil_div(cols, kTileDim), lhs, lhs_ld, strip,
                                        kElements * steps / kTileDepth, adds, tile, tile_ld);
  }
#else
  static constexpr int kTileRows = kOuterRows;
  static void multiply(int64_t rows, int64_t cols, const PanelBF16* lhs, int64_t lhs_ld,
                       const PanelBF16* strip, int64_t steps, bool adds, float* tile, int64_t tile_ld,
                       Prefetch fetch) {
    outer_rows<OuterBF16, kTileRows>(rows, cols, lhs, lhs_ld, strip, steps, adds, tile, tile_ld, fetch);
  }
#endif

  static void pack_lhs(const void* lhs, DType, int64_t first, int64_t count, PanelBF16* out) {
    memcpy(out, static_cast<const BF16*>(lhs) + first, count * sizeof(BF16));
  }

  static const PanelBF16* direct_lhs(const GemmTerm& term, int64_t first) {
    return static_cast<const PanelBF16*>(term.lhs) + first;
  }

  static bool fill_dense(const MatrixView& rhs, float, int64_t first, int64_t depth, int64_t cols,
                         PanelBF16* out) {
    if (rhs.nf4) return false;
    constexpr int64_t kRun = 2 * kLanes;
    const int64_t padded = round_up(depth, kDepthUnit);
    const BF16* row = static_cast<const BF16*>(rhs.data) + first;
    for (int64_t p = 0; p < padded; p += kElements, row += kElements * rhs.ld) {
      // The columns that exist in the first and in the second row.
      const int64_t first_cols = p < depth ? cols : 0, second_cols = p + 1 < depth ? cols : 0;
      for (int64_t c = 0; c < round_up(cols, kStrip); c += kRun) {
        PanelBF16* pairs = out + c / kStrip * kStrip * padded + p * kStrip + c % kStrip * kElements;
        interleave_pairs(load_run(row + c, first_cols - c), load_run(row + rhs.ld + c, second_cols - c),
                         pairs);
      }
    }
    return true;
  }

  static void fill_step(const MatrixView& rhs, float scale, int64_t first, int64_t rows, int64_t cols,
                        PanelBF16* out) {
    // Row starts that are multiples of 32 keep runs of 32 within one block and in whole bytes.
    if (rhs.nf4 && rhs.nf4->codes && rows == 2 && cols == kStrip &&
        (first | rhs.ld) % nf4::kMinBlocksize == 0) {
      return decode_step(*rhs.nf4, first, first + rhs.ld, out);
    }
#if PEFT_KERNELS_PERMUTES_BYTES
    // Columns from a multiple of 64 on share a scale.
    if (rhs.nf4 && !rhs.nf4->codes && rows == 2 && cols == kStrip && (first | rhs.ld) % kStrip == 0) {
      return with_byte_codes(*rhs.nf4, [&](auto codes) { decode_bytes(codes, *rhs.nf4, first, out); });
    }
#endif
    PanelBF16 pair[2][kStrip];
    memset(pair, 0, sizeof(pair));
    for (int64_t p = 0; p < rows; ++p) fill_panel_row(rhs, first + p * rhs.ld, cols, scale, pair[p]);
    for (int64_t c = 0; c < kStrip; c += 2 * kLanes) {
      interleave_pairs(load_pairs(pair[0] + c), load_pairs(pair[1] + c), out + 2 * c);
    }
  }

 private:
#if PEFT_KERNELS_TILES
  // Up to kVectors vectors of a strip.
  template <int kVectors>
  static void multiply_vectors(int64_t vectors, const PanelBF16* lhs, int64_t lhs_ld, const PanelBF16* strip,
                               int64_t steps, bool adds, float* tile, int64_t tile_ld) {
    if constexpr (kVectors > 1) {
      if (vectors < kVectors) {
        return multiply_vectors<kVectors - 1>(vectors, lhs, lhs_ld, strip, steps, adds, tile, tile_ld);
      }
    }
    tiles_block<1, kVectors>(lhs, lhs_ld * sizeof(PanelBF16), strip, kStrip * sizeof(uint32_t), steps, adds,
                             tile, tile_ld);
  }
#endif
  // The first `count` of 32 elements, the others zero.
  static VecPairs load_run(const BF16* p, int64_t count) {
    return count >= 2 * kLanes ? load_pairs(p) : load_pairs_part(p, max64(count, 0));
  }
#if PEFT_KERNELS_PERMUTES_BYTES
  // A step of two rows of bytes.
  template <class Codes>
  static void decode_bytes(Codes, const Nf4View& w, int64_t first, PanelBF16* out) {
    const int64_t row = first / w.cols, block = (first % w.cols) >> w.block_shift;
    const float* scales = w.absmax + block;
    const uint8_t* codes = w.packed + first;
    const auto scale_of = [&](int64_t at) { return splat(scales[(at >> w.row_shift) * w.blocks_in_row]); };
    typename Codes::Pairs().decode_rows(codes, scale_of(row), codes + w.cols, scale_of(row + 1), out);
  }
#endif
  static PairTable pair_table(const Nf4View& w, int64_t block0, int64_t block1) {
    const float scale0 = block_absmax(w, block0), scale1 = block_absmax(w, block1);
    if (!w.zero_points) return {*w.codes, scale0, scale1};  // one load of the codes
    return {block_codes(w, block0), scale0, block_codes(w, block1), scale1};
  }
  static void decode_step(const Nf4View& w, int64_t first0, int64_t first1, PanelBF16* out) {
    if (w.block_shift < 5) return decode_short_blocks(w, first0, first1, out);
    const uint8_t *row0 = w.packed + first0 / 2, *row1 = w.packed + first1 / 2;
    constexpr int64_t kHalf = nf4::kMinBlocksize;
    static_assert(kStrip == 2 * kHalf, "");
    const int64_t block0 = first0 >> w.block_shift, block1 = first1 >> w.block_shift;
    const int64_t next0 = (first0 + kHalf) >> w.block_shift, next1 = (first1 + kHalf) >> w.block_shift;
    const PairTable table = pair_table(w, block0, block1);
    decode_half(table, row0, row1, out);
    if (block0 == next0 && block1 == next1) {
      decode_half(table, row0 + kHalf / 2, row1 + kHalf / 2, out + 2 * kHalf);
    } else {
      const PairTable next = pair_table(w, next0, next1);
      decode_half(next, row0 + kHalf / 2, row1 + kHalf / 2, out + 2 * kHalf);
    }
  }
  static void decode_short_blocks(const Nf4View& w, int64_t first0, int64_t first1, PanelBF16* out) {
    static_assert(PairTable::kStep == kSmallestBlocksize, "");
#pragma GCC unroll 4
    for (int64_t i = 0; i < kStrip; i += kSmallestBlocksize) {
      const PairTable table = pair_table(w, (first0 + i) >> w.block_shift, (first1 + i) >> w.block_shift);
      table.decode(w.packed + (first0 + i) / 2, w.packed + (first1 + i) / 2, out + 2 * i);
    }
  }
  static void decode_half(const PairTable& table, const uint8_t* row0, const uint8_t* row1, PanelBF16* out) {
#pragma GCC unroll 2
    for (int64_t i = 0; i < nf4::kMinBlocksize; i += PairTable::kStep) {
      table.decode(row0 + i / 2, row1 + i / 2, out + 2 * i);
    }
  }
};
