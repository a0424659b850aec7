// NF4 GEMV: a packed weight times one to kFewRows rows of lhs, as in generation. The weight is read once,
// four rows at a time, and decoded in registers.
//
// A chunk is one vector of packed bytes. Each lane holds kSteps codes: shifting right by a nibble brings one
// code after another to the bottom, where a permutation looks up its value. The codes of one shift belong to
// elements kSteps apart, so lhs is rearranged in that order once per call:
//
//   lane l, shift j:  element kSteps * l + (j ^ 1)        (the high nibble of a byte is the even element)
//
// The absmax is applied after the eight multiplications of a 32-bit lane, whose elements are in one block.
// Zero points are subtracted at the end, times the sums of lhs over blocks: a vector has kLanes blocks.

constexpr int64_t kChunk = 8 * kLanes;     // elements
constexpr int64_t kGemvMaxWeightRows = 4;  // rows of the weight that share the loads of lhs
constexpr int kGemvPass = 4;               // rows of lhs that are multiplied together

struct GemvF32 : FloatSteps {
  using Lhs = float;  // rearranged
  static constexpr int kSteps = 8;
  using Table = CodeTable;
  static float factor(const CodeValues&) { return 1.0f; }  // of the values in the table
  static Vec lookup(const Table& table, VecI bits) { return lookup_code(table, bits); }
  static VecI next(VecI bits) { return next_nibble(bits); }
};

#if PEFT_KERNELS_BF16_DOT
struct GemvBF16 : PairSteps {
  using Lhs = BF16;
  static constexpr int kSteps = 4;
  using Table = PairCodeTable;
  static float factor(const CodeValues& codes) { return codes.bf16_factor; }
  static VecPairs lookup(const Table& table, VecI bits) { return lookup_code(table, bits); }
  static VecI next(VecI bits) { return next_nibble16(bits); }
};
#else
using GemvBF16 = GemvF32;
#endif

struct GemvLayout {
  int64_t chunks;        // per row, the last one padded
  int64_t lhs_values;    // of one rearranged row of lhs
  int64_t scale_floats;  // of one weight row
  int64_t sum_floats;    // with zero points, of one row of lhs: its sums over blocks, then zeros
};

inline GemvLayout gemv_layout(const GemmTerm& term) {
  const int64_t chunks = (term.depth + kChunk - 1) / kChunk;
  const int64_t blocksize = int64_t{1} << term.rhs.nf4->block_shift;
  return {chunks, chunks * kChunk, round_up(chunks * kChunk / min64(nf4::kMinBlocksize, blocksize), 16),
          term.rhs.nf4->zero_points ? round_up(term.depth / blocksize, kLanes) : 0};
}

// Scratch: the decoding table of scales that are codes, the rearranged lhs, the scales of a few rows; with
// zero points the sums of lhs, and what is added for each of them.
struct GemvScratch {
  Codebook* book;
  void* lhs;
  float* scales;
  float *sums, *shifts;

  GemvScratch(const GemvLayout& layout, int64_t rows, void* scratch)
      : book(static_cast<Codebook*>(scratch)),
        lhs(static_cast<char*>(scratch) + kBookBytes),
        scales(static_cast<float*>(lhs) + rows * layout.lhs_values),
        sums(scales + kGemvMaxWeightRows * layout.scale_floats + kCodeRun),
        shifts(sums + rows * layout.sum_floats) {}
  static int64_t bytes(const GemvLayout& layout, int64_t rows) {
    const int64_t scales = kGemvMaxWeightRows * layout.scale_floats + kCodeRun;
    const int64_t shifts = layout.sum_floats ? rows * layout.sum_floats + scales : 0;
    return kBookBytes + (rows * layout.lhs_values + scales + shifts) * static_cast<int64_t>(sizeof(float));
  }

 private:
  static constexpr int64_t kBookBytes = (sizeof(Codebook) + 63) / 64 * 64;
};

#if PEFT_KERNELS_TWO_TABLES
#  include "linear_gemv_folded.inl"
#endif

// Whether this kernel computes a GEMM: a packed weight, whose rows start at block boundaries, and few rows.
// The rows of the whole GEMM decide, not those of this task: results must not depend on the division into
// tasks.
inline bool gemv_serves(const GemmParams& p) {
  if (p.term_count == 0) return false;
  const GemmTerm& term = p.terms[0];  // a packed weight is the first term, and the only packed one
  if (!term.rhs.nf4 || !term.rhs.nf4->codes || term.rhs.ld % (int64_t{1} << term.rhs.nf4->block_shift) != 0)
    return false;
#if PEFT_KERNELS_TWO_TABLES
  if (folded_serves(term)) {
    // With more rows tiles are faster.
    constexpr int64_t kMostRows = PEFT_KERNELS_TILES ? kFewRows : kFoldedRows;
    return p.m <= kMostRows && FoldedScratch::bytes(term, p.m) <= kGemvScratchBytes;
  }
#endif
  // Decoding short blocks takes longer, so packing lhs pays from more rows on. NF4 keeps its limit, and so
  // its bits.
  const bool is_short =
      has_bf16_values(term) && term.rhs.nf4->codes != kCodeValues && term.rhs.nf4->block_shift < 6;
  if (p.m > (is_short && !PEFT_KERNELS_TILES ? 2 * kFewRows : kFewRows)) return false;
  return GemvScratch::bytes(gemv_layout(term), p.m) <= kGemvScratchBytes;
}

// The sums of row m of lhs over blocks, then zeros up to `padded`.
inline void gemv_block_sums(const GemmTerm& term, int64_t m, int64_t padded, float* out) {
  constexpr int64_t kPart = nf4::kMinBlocksize;
  const int64_t blocksize = int64_t{1} << term.rhs.nf4->block_shift;
  const int64_t blocks = term.depth / blocksize, parts = blocksize / kPart;
  int64_t first = m * term.lhs_ld;
  for (int64_t b = 0; b < blocks; ++b) {
    double sum = 0.0;  // its error is that of all columns, which the mean of a row's logits shows
    for (int64_t i = 0; i < parts; ++i, first += kPart) {
      float values[kPart];
      widen_run(term.lhs, term.lhs_dtype, first, kPart, 1.0f, values);
      for (const float value : values) sum += value;
    }
    out[b] = static_cast<float>(sum);
  }
  for (int64_t b = blocks; b < padded; ++b) out[b] = 0.0f;
}

template <class Gemv>
void gemv_arrange_lhs(const GemmTerm& term, const Rect& rect, void* scratch) {
  const GemvLayout layout = gemv_layout(term);
  const GemvScratch to(layout, rect.m1 - rect.m0, scratch);
  if (term.rhs.nf4->q8) *to.book = Codebook(term.rhs.nf4->scale_values);
  auto* arranged = static_cast<typename Gemv::Lhs*>(to.lhs);
  constexpr int kStepLanes = kChunk / Gemv::kSteps;
  for (int64_t m = rect.m0; m < rect.m1; ++m) {
    for (int64_t first = 0; first < layout.lhs_values; first += kChunk, arranged += kChunk) {
      float natural[kChunk] = {}, shifted[kChunk];
      widen_run(term.lhs, term.lhs_dtype, m * term.lhs_ld + first, min64(kChunk, term.depth - first), 1.0f,
                natural);
      for (int j = 0; j < Gemv::kSteps; ++j) {
        for (int l = 0; l < kStepLanes; ++l)
          shifted[j * kStepLanes + l] = natural[Gemv::kSteps * l + (j ^ 1)];
      }
      narrow_run(shifted, kChunk, arranged);
    }
    if (layout.sum_floats) {
      gemv_block_sums(term, m, layout.sum_floats, to.sums + (m - rect.m0) * layout.sum_floats);
    }
  }
}

// out[r][i] += row r of lhs . row i of the weight, for kRows and kWeightRows. `lhs_sums`: of the first row.
template <class Gemv, int kRows, int kWeightRows, int kBlocks, bool kShifted>
void gemv_tile(const Nf4View& w, const uint8_t* packed, int64_t depth, const GemvLayout& layout,
               const typename Gemv::Lhs* lhs, const float* scales, const float* lhs_sums, const float* shifts,
               float* out) {
  const typename Gemv::Table table(kShifted ? w.codes[kZeroPoint] : *w.codes);
  const int64_t row_bytes = depth / 2;
  Vec sums[kRows][kWeightRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kWeightRows; ++i) sums[r][i] = zero();
  }
  const auto add_chunk = [&](int64_t chunk, const uint8_t* bytes,
                             int64_t bytes_ld) __attribute__((always_inline)) {
    VecI bits[kWeightRows];
    Vec partial[kRows][kWeightRows];
#pragma GCC unroll 4
    for (int i = 0; i < kWeightRows; ++i) {
      bits[i] = load_bytes(bytes + i * bytes_ld);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) partial[r][i] = zero();
    }
    const auto* x = lhs + chunk * kChunk;
#pragma GCC unroll 8
    for (int j = 0; j < Gemv::kSteps; ++j) {
      decltype(Gemv::lookup(table, bits[0])) values[kWeightRows];
#pragma GCC unroll 4
      for (int i = 0; i < kWeightRows; ++i) {
        values[i] = Gemv::lookup(table, bits[i]);
        bits[i] = Gemv::next(bits[i]);
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const auto xj = Gemv::load_steps(x + r * layout.lhs_values + j * (kChunk / Gemv::kSteps));
#pragma GCC unroll 4
        for (int i = 0; i < kWeightRows; ++i) partial[r][i] = Gemv::mac(xj, values[i], partial[r][i]);
      }
    }
    const int64_t block = (chunk * kChunk) >> w.block_shift;
#pragma GCC unroll 4
    for (int i = 0; i < kWeightRows; ++i) {
      const Vec scale = spread_scales<kBlocks>(scales + i * layout.scale_floats + block);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) sums[r][i] = fma(partial[r][i], scale, sums[r][i]);
    }
  };
  const int64_t whole = depth / kChunk;
  // The next rows are contiguous with these. Prefetch them in order: a few rows read side by side are too
  // short for the hardware prefetcher.
  constexpr int64_t kAhead = 4096;
  const uint8_t* ahead = packed + max64(kAhead, kWeightRows * row_bytes);
  for (int64_t chunk = 0; chunk < whole; ++chunk) {
#pragma GCC unroll 4
    for (int i = 0; i < kWeightRows; ++i, ahead += kChunk / 2) __builtin_prefetch(ahead);
    add_chunk(chunk, packed + chunk * kChunk / 2, row_bytes);
  }
  if (whole < layout.chunks) {  // a copy: the packed weight may end here
    uint8_t bytes[kWeightRows][kChunk / 2] = {};
    for (int i = 0; i < kWeightRows; ++i) {
      memcpy(bytes[i], packed + i * row_bytes + whole * kChunk / 2, row_bytes - whole * kChunk / 2);
    }
    add_chunk(whole, bytes[0], kChunk / 2);
  }
  for (int64_t b = 0; kShifted && b < layout.sum_floats; b += kLanes) {
#pragma GCC unroll 4
    for (int i = 0; i < kWeightRows; ++i) {
      const Vec shift = load(shifts + i * layout.scale_floats + b);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        sums[r][i] = fma(load(lhs_sums + r * layout.sum_floats + b), shift, sums[r][i]);
      }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
    float four[4] = {};
    add_lane_sums(sums[r][0], kWeightRows > 1 ? sums[r][1 % kWeightRows] : zero(),
                  kWeightRows > 2 ? sums[r][2 % kWeightRows] : zero(),
                  kWeightRows > 2 ? sums[r][3 % kWeightRows] : zero(), four);
    for (int i = 0; i < kWeightRows; ++i) out[r * kStrip + i] += four[i];
  }
}

// How many weight rows share the loads of lhs: as many as fit in registers.
template <int kRows>
constexpr int gemv_weight_rows() {
  constexpr int kMost = kRegisters == 32 ? 8 / kRows : 2 / kRows;
  return kMost >= 4 ? 4 : kMost >= 2 ? 2 : 1;
}

// The scales of blocks [first, first + count), times `factor`, then zeros up to `padded`. May write up to
// kCodeRun values more.
inline void gemv_scales(const Codebook& book, const Nf4View& w, int64_t first, int64_t count, float factor,
                        int64_t padded, float* out) {
  if (PEFT_KERNELS_PERMUTES_BYTES && w.q8) {
    unpack_scales(book, w, first, count, out);
    for (int64_t b = 0; factor != 1.0f && b < count; ++b) out[b] *= factor;
  } else if (w.half_scales) {
    widen_scales(w, first, count, factor, out);
  } else {
    for (int64_t b = 0; b < count; ++b) out[b] = block_absmax(w, first + b) * factor;
  }
  for (int64_t b = count; b < padded; ++b) out[b] = 0.0f;
}

// What is added for each sum of lhs: the scale times the difference of the table's zero point and the
// block's.
inline void gemv_shifts(const Nf4View& w, int64_t first, int64_t count, int64_t padded, const float* scales,
                        float* out) {
  for (int64_t b = 0; b < count; ++b) {
    out[b] = static_cast<float>(kZeroPoint - w.zero_points[first + b] % kZeroPoints) * scales[b];
  }
  for (int64_t b = count; b < padded; ++b) out[b] = 0.0f;
}

// Up to kRows rows of lhs, from row `first` of the task on.
template <class Gemv, int kRows, int kBlocks, bool kShifted>
void gemv_rows(const GemmTerm& term, int64_t first, int64_t rows, int64_t n0, int64_t cols,
               const GemvScratch& s, float* tile) {
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      return gemv_rows<Gemv, kRows - 1, kBlocks, kShifted>(term, first, rows, n0, cols, s, tile);
    }
  }
  constexpr int kWeightRows = gemv_weight_rows<kRows>();
  const Nf4View& w = *term.rhs.nf4;
  const GemvLayout layout = gemv_layout(term);
  const int64_t blocks = term.depth >> w.block_shift;
  const float inverse = 1.0f / Gemv::factor(*w.codes);
  const auto* lhs = static_cast<const typename Gemv::Lhs*>(s.lhs) + first * layout.lhs_values;
  const float* lhs_sums = s.sums + first * layout.sum_floats;
  for (int64_t c = 0; c < cols;) {
    const int64_t count = cols - c >= kWeightRows ? kWeightRows : 1;
    for (int64_t i = 0; i < count; ++i) {
      float* scales = s.scales + i * layout.scale_floats;
      const int64_t block = (n0 + c + i) * blocks;
      gemv_scales(*s.book, w, block, blocks, inverse, layout.scale_floats, scales);
      if constexpr (kShifted) {
        gemv_shifts(w, block, blocks, layout.scale_floats, scales, s.shifts + i * layout.scale_floats);
      }
    }
    const uint8_t* packed = w.packed + (n0 + c) * term.depth / 2;
    if (count == kWeightRows) {
      gemv_tile<Gemv, kRows, kWeightRows, kBlocks, kShifted>(w, packed, term.depth, layout, lhs, s.scales,
                                                             lhs_sums, s.shifts, tile + c);
    } else {
      gemv_tile<Gemv, kRows, 1, kBlocks, kShifted>(w, packed, term.depth, layout, lhs, s.scales, lhs_sums,
                                                   s.shifts, tile + c);
    }
    c += count;
  }
}

template <class Gemv, int kBlocks>
void gemv_blocks(const GemmTerm& term, int64_t rows, int64_t n0, int64_t cols, void* scratch, float* tile) {
  const GemvLayout layout = gemv_layout(term);
  const GemvScratch s(layout, rows, scratch);
  for (int64_t r = 0; r < rows; r += kGemvPass) {
    float* out = tile + r * kStrip;
    if (layout.sum_floats) {
      gemv_rows<Gemv, kGemvPass, kBlocks, true>(term, r, rows - r, n0, cols, s, out);
    } else {
      gemv_rows<Gemv, kGemvPass, kBlocks, false>(term, r, rows - r, n0, cols, s, out);
    }
  }
}

template <class Gemv>
void gemv_add_term(const GemmTerm& term, int64_t rows, int64_t n0, int64_t cols, void* scratch, float* tile) {
  const int64_t blocks_in_chunk = kChunk >> term.rhs.nf4->block_shift;
  if (blocks_in_chunk <= 1) return gemv_blocks<Gemv, 1>(term, rows, n0, cols, scratch, tile);
  if (blocks_in_chunk == 2) return gemv_blocks<Gemv, 2>(term, rows, n0, cols, scratch, tile);
  if constexpr (kChunk >= 4 * kSmallestBlocksize) {
    if (blocks_in_chunk == 4) return gemv_blocks<Gemv, 4>(term, rows, n0, cols, scratch, tile);
  }
  if constexpr (kChunk >= 8 * kSmallestBlocksize) gemv_blocks<Gemv, 8>(term, rows, n0, cols, scratch, tile);
}

inline void gemv_arrange_lhs(const GemmTerm& term, const Rect& rect, void* scratch) {
#if PEFT_KERNELS_TWO_TABLES
  if (folded_serves(term)) return folded_arrange_lhs(term, rect, scratch);
#endif
  has_bf16_values(term) ? gemv_arrange_lhs<GemvBF16>(term, rect, scratch)
                        : gemv_arrange_lhs<GemvF32>(term, rect, scratch);
}

inline void gemv_add_term(const GemmTerm& term, int64_t rows, int64_t n0, int64_t cols, void* scratch,
                          float* tile) {
#if PEFT_KERNELS_TWO_TABLES
  if (folded_serves(term)) return folded_add_term(term, rows, n0, cols, scratch, tile);
#endif
  has_bf16_values(term) ? gemv_add_term<GemvBF16>(term, rows, n0, cols, scratch, tile)
                        : gemv_add_term<GemvF32>(term, rows, n0, cols, scratch, tile);
}
