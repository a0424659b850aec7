// The units that linear_packed.inl multiplies in. A unit packs lhs, decodes rows of rhs in the same order,
// and multiplies and sums.
//
// The order follows from unpacking nibbles: of every kOrder elements the even ones, which are high nibbles,
// come before the odd ones. A step is what one lane multiplies at once.

// Of one decoded row: an odd number of cache lines, to spread rows over cache sets.
constexpr int64_t kPackedRowBytes = PEFT_KERNELS_TILES ? 704 : 576;
// Register tiles: the number of vectors of sums, and how many at most belong to one row of rhs.
constexpr int kPackedSums = kRegisters == 32 ? 24 : 12;
constexpr int kPackedVectors = kRegisters == 32 ? 4 : 2;

// The vectors of a strip with `rows` rows.
inline int64_t strip_vectors(int64_t rows) { return (min64(rows, kPackRows) + kLanes - 1) / kLanes; }

// Bytes that share a scale, in runs of 2 * kHalf: the even before the odd, and zeros after the last.
template <class Codes, int kHalf, class Out>
void decode_bytes_split(const uint8_t* codes, int64_t count, float scale, Out* out) {
  const Vec factor = splat(scale * Codes::kFactor);
  for (; count > 0; count -= 2 * kHalf, codes += 2 * kHalf, out += 2 * kHalf) {
    uint8_t copy[2 * kHalf] = {};
    const bool is_whole = count >= 2 * kHalf;
    if (!is_whole) memcpy(copy, codes, count);
    uint16_t pairs[kHalf];
    typename Codes::Value values[2][kHalf];
    memcpy(pairs, is_whole ? codes : copy, sizeof(pairs));
    for (int i = 0; i < kHalf; ++i) {
      values[0][i] = Codes::value(static_cast<uint8_t>(pairs[i]));
      values[1][i] = Codes::value(static_cast<uint8_t>(pairs[i] >> 8));
    }
    for (int i = 0; i < 2 * kHalf; i += kLanes) store(out + i, mul(load(values[0] + i), factor));
  }
}

// fp32 arithmetic, for lhs of any dtype and packed weights whose rows are whole bytes and blocks.
struct FloatsUnit : FloatSteps {
  using Step = float;  // of packed lhs
  static constexpr int64_t kOrder = 2 * kLanes;
  // Depth of one pass, usual and maximum: a strip of lhs of that depth takes most of L1.
  static constexpr int64_t kUsualDepth = 128, kDepth = 128;
  static constexpr int64_t kChain = 64;  // steps of one running sum: longer sums lose bits (linear_outer.inl)
  static constexpr int kGroup = kPackedSums;
  static constexpr int kVectors = kPackedVectors;  // of a register tile
  template <int kSide>
  static constexpr int kTileRows = kPackedSums / kSide;
  static constexpr int64_t kFewRowsCols = 48;  // rows of rhs decoded together when lhs is one strip

  static bool serves(const GemmTerm& term) {
    return term.rhs.nf4 && (term.rhs.ld | term.depth) % nf4::kMinBlocksize == 0;
  }

  template <class T>
  static void pack_vector(const T* x, int64_t ld, int64_t rows, int64_t depth, float* out, int64_t out_ld) {
    for (int64_t k = 0; k < depth; k += kOrder, out += kOrder * out_ld) {
      for (int half = 0; half < 2; ++half) {
        Vec block[kLanes];
        for (int r = 0; r < kLanes; ++r) block[r] = r < rows ? load(x + r * ld + k + half * kLanes) : zero();
        transpose(block);
        float* even = out + half * kLanes / 2 * out_ld;
        for (int i = 0; i < kLanes; ++i) store(even + (i / 2 + (i % 2 ? kLanes : 0)) * out_ld, block[i]);
      }
    }
  }
  static void pack_vector(const PackParams& p, int64_t first, float* out, int64_t out_ld) {
    const int64_t rows = min64(kLanes, p.rows - first), at = first * p.depth;
    with_type(p.dtype, [&](auto type) {
      pack_vector(static_cast<const decltype(type)*>(p.x) + at, p.depth, rows, p.depth, out, out_ld);
    });
  }

  // Decodes elements [first, first + count) of rhs.
  static void fill_row(const MatrixView& rhs, int64_t first, int64_t count, float* out) {
    const Nf4View w = *rhs.nf4;  // a local copy, which stores to `out` cannot alias
    if (!w.codes) {
      return with_byte_codes(w, [&](auto codes) {
        for_byte_blocks(w, first, count, [&](int64_t begin, int64_t end, float scale) {
          decode_bytes_split<decltype(codes), kLanes>(w.packed + first + begin, end - begin, scale,
                                                      out + begin);
        });
      });
    }
    int64_t i = 0;
    // Builds a table per step, even for longer blocks: without a loop over blocks the steps overlap.
    if (first % 64 == 0 && w.block_shift >= 6) {
#pragma GCC unroll 2
      for (; i + 64 <= count; i += 64) decode_run<64>(w, first + i, out + i);
    }
    for (; w.block_shift < 5 && i < count; i += kOrder) {
      if constexpr (kOrder < kSmallestBlocksize) {
        float natural[kOrder];
        const int64_t left = min64(kOrder, count - i);
        dequantize_run(w, first + i, left, natural);
        for (int64_t j = 0; j < left; ++j) out[i + j / 2 + (j % 2 ? kLanes : 0)] = natural[j];
      } else {
        decode_short_blocks(w, *w.codes, first + i, out + i);
      }
    }
    for (; i < count; i += nf4::kMinBlocksize) decode_run<nf4::kMinBlocksize>(w, first + i, out + i);
  }

  template <int kSide>
  static void multiply(const float* rows, const float* strip, int64_t steps, bool adds, float* tile,
                       int64_t tile_ld, const char*, int64_t) {
    sum_steps<FloatsUnit, kTileRows<kSide>, kSide>(rows, Constant<kPackedRowBytes / sizeof(*rows)>{}, strip,
                                                   Constant<kSide * kLanes>{}, steps, adds, tile, tile_ld,
                                                   no_prefetch(tile));
  }

 private:
  template <int kRun>
  static void decode_run(const Nf4View& w, int64_t first, float* out) {
    const int64_t block = first >> w.block_shift;
    const NibbleTable<float> table(block_codes(w, block), block_absmax(w, block));
#pragma GCC unroll 8
    for (int i = 0; i < kRun; i += kOrder)
      table.decode_split(w.packed + (first + i) / 2, out + i, out + i + kLanes);
  }
  // kOrder elements of blocks of 16. A template, so that only ISAs with long steps need decode_split_blocks.
  template <class Codes>
  static void decode_short_blocks(const Nf4View& w, const Codes& codes, int64_t first, float* out) {
    if constexpr (kOrder > kSmallestBlocksize) {
      const int64_t block = first >> w.block_shift;
      decode_split_blocks(codes, block_absmax(w, block), block_absmax(w, block + 1), w.packed + first / 2,
                          out);
    } else {
      decode_run<kSmallestBlocksize>(w, first, out);
    }
  }
};

#if PEFT_KERNELS_BF16_DOT
// Pairs of bf16, for lhs in bf16 and any weight of no more precision.
struct PairsUnit : PairSteps {
  using Step = uint32_t;
  static constexpr int64_t kOrder = 4 * kLanes;
  static constexpr int64_t kChain = 128;
#  if PEFT_KERNELS_TILES
  static constexpr int64_t kUsualDepth = 256, kDepth = 320;
  static constexpr int kGroup = 64;  // a multiple of every kTileRows
  static constexpr int kVectors = 2;
  template <int kSide>
  static constexpr int kTileRows = kTileDim * (4 / kSide);
  static constexpr int64_t kFewRowsCols = 64;
#  else
  static constexpr int64_t kUsualDepth = 256, kDepth = 256;
  static constexpr int kGroup = kPackedSums;
  static constexpr int kVectors = kPackedVectors;
  template <int kSide>
  static constexpr int kTileRows = kPackedSums / kSide;
  static constexpr int64_t kFewRowsCols = 48;
#  endif

  static void pack_vector(const PackParams& p, int64_t first, uint32_t* out, int64_t out_ld) {
    const BF16* x = static_cast<const BF16*>(p.x) + first * p.depth;
    const int64_t rows = min64(kLanes, p.rows - first);
    for (int64_t k = 0; k < p.depth; k += kOrder, out += kOrder / 2 * out_ld) {
      Vec even[kLanes], odd[kLanes];
      for (int r = 0; r < kLanes; ++r) {
        const EvenOdd row = load_even_odd(x + r * p.depth + k, r < rows ? p.depth - k : 0);
        even[r] = as_floats(row.even);
        odd[r] = as_floats(row.odd);
      }
      transpose(even);
      transpose(odd);
      for (int r = 0; r < kLanes; ++r) {
        store_bits(out + r * out_ld, even[r]);
        store_bits(out + (kLanes + r) * out_ld, odd[r]);
      }
    }
  }

  // Decodes elements [first, first + count) of rhs, zero-padded.
  static void fill_row(const MatrixView& rhs, int64_t first, int64_t count, PanelBF16* out) {
    if (!rhs.nf4) {
      const BF16* row = static_cast<const BF16*>(rhs.data) + first;
      for (int64_t i = 0; i < count; i += kOrder) store_ordered(row + i, count - i, out + i);
      return;
    }
    const Nf4View w = *rhs.nf4;  // a local copy, which stores to `out` cannot alias
    if (!w.codes) {
      return with_byte_codes(w, [&](auto codes) {
        using Codes = decltype(codes);
        for_byte_blocks(w, first, count, [&](int64_t begin, int64_t end, float scale) {
#  if PEFT_KERNELS_PERMUTES_BYTES
          const typename Codes::Pairs table;
          static_assert(kOrder == 64, "");
          for (; begin + kOrder <= end; begin += kOrder) {
            table.decode_even_odd(w.packed + first + begin, splat(scale), out + begin);
          }
#  endif
          decode_bytes_split<Codes, kOrder / 2>(w.packed + first + begin, end - begin, scale, out + begin);
        });
      });
    }
    int64_t i = 0;
    constexpr int64_t kRun = 64;  // of EvenOddTable
    if (first % kRun == 0 && w.block_shift >= 6) {
      const int64_t whole = count / kRun * kRun;
      const uint8_t* bytes = w.packed + first / 2;
      // Builds a table per run, even for longer blocks: without a loop over blocks the runs overlap.
#  pragma GCC unroll 4
      for (; i < whole; i += kRun) {
        const int64_t block = (first + i) >> w.block_shift;
        const EvenOddTable table(block_codes(w, block), block_absmax(w, block));
        table.decode(bytes + i / 2, out + i);
      }
    }
#  if PEFT_KERNELS_TWO_TABLES
    if (first % kRun == 0 && w.block_shift < 6) {
      const int64_t whole = count / kRun * kRun;
#    pragma GCC unroll 4
      for (; i < whole; i += kRun) {
        const int64_t block = (first + i) >> w.block_shift;
        if (w.block_shift == 5) {
          const PairTable table(block_codes(w, block), block_absmax(w, block), block_codes(w, block + 1),
                                block_absmax(w, block + 1));
          table.decode_even_odd(w.packed + (first + i) / 2, out + i);
        } else {
          const QuadTable table(*w.codes, block_absmax(w, block), block_absmax(w, block + 1),
                                block_absmax(w, block + 2), block_absmax(w, block + 3));
          table.decode_even_odd(w.packed + (first + i) / 2, out + i);
        }
      }
    }
#  endif
    for (; i < count; i += kOrder) {  // unaligned, or the end of a row
      PanelBF16 natural[kOrder];
      const int64_t left = min64(kOrder, count - i);
      dequantize_run(w, first + i, left, natural);
      store_ordered(natural, left, out + i);
    }
  }

  template <int kSide>
  static void multiply(const PanelBF16* rows, const uint32_t* strip, int64_t steps, bool adds, float* tile,
                       int64_t tile_ld, const char* ahead, int64_t ahead_bytes) {
#  if PEFT_KERNELS_TILES
    const int64_t tile_steps = kElements * steps / kTileDepth;
    tiles_block<4 / kSide, kSide>(rows, kPackedRowBytes, strip, kSide * 64, tile_steps, adds, tile, tile_ld,
                                  {ahead, ceil_div(ahead_bytes, 64 * tile_steps)});
#  else
    sum_steps<PairsUnit, kTileRows<kSide>, kSide>(rows, Constant<kPackedRowBytes / sizeof(*rows)>{}, strip,
                                                  Constant<kSide * kLanes>{}, steps, adds, tile, tile_ld,
                                                  no_prefetch(tile));
#  endif
  }

 private:
  // The first `count` of kOrder elements, the others zero.
  static EvenOdd load_even_odd(const void* p, int64_t count) {
    const BF16* x = static_cast<const BF16*>(p);
    constexpr int64_t kHalf = kOrder / 2;
    if (count >= kOrder) return even_odd(load_pairs(x), load_pairs(x + kHalf));
    if (count >= kHalf) return even_odd(load_pairs(x), load_pairs_part(x + kHalf, count - kHalf));
    return even_odd(load_pairs_part(x, count), load_pairs_part(x, 0));
  }
  static void store_ordered(const void* natural, int64_t left, PanelBF16* out) {
    const EvenOdd step = load_even_odd(natural, left);
    store_pairs(out, step.even);
    store_pairs(out + kOrder / 2, step.odd);
  }
};
#else
using PairsUnit = FloatsUnit;
#endif
