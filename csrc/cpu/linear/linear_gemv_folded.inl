// The GEMV of linear_gemv.inl on pairs of bf16, with each block's absmax folded into its code table. A
// register holds two tables. Building them costs the same for sixteen rows of lhs as for one, and sums run on
// from block to block. The weight's values are rounded as dequantising rounds them.
//
// A chunk is two blocks, 64 bytes. Its vectors 0 to 3 hold its bytes, with the first block in the lower half
// of the lanes: shifted by 0 and by 4 bits, then the same starting one byte later. Lhs has the same layout:
//
//   lane l, vector j:  element 4 l + (j ^ 1)
//
// Reading from the next byte on must stay within the row, so its last one or two blocks are decoded
// separately.

constexpr int64_t kFoldedBlock = 64;  // elements; longer blocks are treated as several of these
constexpr int64_t kFoldedChunk = 2 * kFoldedBlock;
constexpr int64_t kFoldedPass = 8;                // rows of lhs whose sums fit in registers
constexpr int64_t kFoldedRows = 2 * kFoldedPass;  // with more rows lhs is packed (linear_packed.inl)

inline bool folded_serves(const GemmTerm& term) {
  return term.lhs_dtype == DType::kBF16 && (int64_t{1} << term.rhs.nf4->block_shift) >= kFoldedBlock;
}

// Scratch: the decoding table of the absmax codes, the rearranged lhs, the absmax of kStrip rows.
struct FoldedScratch {
  Codebook* book;
  BF16* lhs;
  float* absmax;

  FoldedScratch(const GemmTerm& term, int64_t rows, void* scratch)
      : book(static_cast<Codebook*>(scratch)),
        lhs(reinterpret_cast<BF16*>(book + 1)),
        absmax(reinterpret_cast<float*>(lhs + rows * term.depth)) {}
  static int64_t bytes(const GemmTerm& term, int64_t rows) {
    const int64_t absmax_floats = kStrip * (term.depth / kFoldedBlock) + kCodeRun;
    return sizeof(Codebook) + rows * term.depth * sizeof(BF16) + absmax_floats * sizeof(float);
  }
};

// Rows of lhs that are multiplied together: all, or half of them.
inline int64_t folded_pass(int64_t rows) { return rows <= kFoldedPass ? rows : ceil_div(rows, 2); }

// One chunk of all rows after another; within a chunk, vector by vector, the rows side by side.
inline void folded_arrange(const GemmTerm& term, int64_t m0, int64_t rows, BF16* out) {
  constexpr int64_t kVector = 2 * kLanes;
  for (int64_t r = 0; r < rows; ++r) {
    const BF16* x = static_cast<const BF16*>(term.lhs) + (m0 + r) * term.lhs_ld;
    BF16* to = out + r * kVector;
    int64_t left = term.depth;
    for (; left > kFoldedChunk; left -= kFoldedChunk, x += kFoldedChunk, to += rows * kFoldedChunk) {
      const EvenOdd first = even_odd(load_pairs(x), load_pairs(x + kVector)),
                    second = even_odd(load_pairs(x + 2 * kVector), load_pairs(x + 3 * kVector));
      const EvenOdd even = even_odd(first.even, second.even), odd = even_odd(first.odd, second.odd);
      store_pairs(to, odd.even);
      store_pairs(to + rows * kVector, even.even);
      store_pairs(to + 2 * rows * kVector, odd.odd);
      store_pairs(to + 3 * rows * kVector, even.odd);
    }
    for (; left > 0; left -= kFoldedBlock, x += kFoldedBlock, to += rows * kFoldedBlock) {
      const EvenOdd run = even_odd(load_pairs(x), load_pairs(x + kVector));
      store_pairs(to, run.even);
      store_pairs(to + rows * kVector, run.odd);
    }
  }
}

inline void folded_arrange_lhs(const GemmTerm& term, const Rect& rect, void* scratch) {
  const int64_t rows = rect.m1 - rect.m0, pass = folded_pass(rows);
  const FoldedScratch to(term, rows, scratch);
  if (term.rhs.nf4->q8) *to.book = Codebook(term.rhs.nf4->scale_values);
  for (int64_t r = 0; r < rows; r += pass) {
    folded_arrange(term, rect.m0 + r, min64(pass, rows - r), to.lhs + r * term.depth);
  }
}

// One absmax per kFoldedBlock elements, for rows [n0, n0 + cols).
inline const float* folded_absmax(const GemmTerm& term, int64_t n0, int64_t cols, const FoldedScratch& s) {
  const Nf4View& w = *term.rhs.nf4;
  const int64_t runs = term.depth / kFoldedBlock, first = n0 * runs, count = cols * runs;
  const int shift = w.block_shift - 6;
  static_assert(kFoldedBlock == 1 << 6, "");
  if (shift == 0 && w.absmax) return w.absmax + first;
  if (w.half_scales) {
    // Widened at the end of the array, and spread from its start on.
    const int64_t blocks = count >> shift;
    float* wide = s.absmax + count - blocks;
    widen_scales(w, first >> shift, blocks, 1.0f, wide);
    for (int64_t i = 0; shift > 0 && i < count; ++i) s.absmax[i] = wide[i >> shift];
  } else if (shift == 0) {
    unpack_scales(*s.book, w, first, count, s.absmax);
  } else {
    for (int64_t i = 0; i < count; ++i) s.absmax[i] = block_absmax(w, (first + i) >> shift);
  }
  return s.absmax;
}

// The values of the codes of each kFoldedBlock of a row of the weight and of those that follow.
struct FoldedCodes {
  const CodeValues* codes;
  const CodeValues& at(int64_t) const { return *codes; }
  void skip(int64_t) {}
};
struct ShiftedCodes {
  const CodeValues* codes;
  const uint8_t* zero_points;
  int shift;
  const CodeValues& at(int64_t run) const { return codes[zero_points[run >> shift] % kZeroPoints]; }
  void skip(int64_t runs) { zero_points += runs >> shift; }
};

// tile[r][i] += row r of lhs . row i of the weight.
template <int kRows, int kWeightRows, class Codes>
void folded_tile(const Codes& codes, const uint8_t* packed, const float* absmax, int64_t depth,
                 const BF16* lhs, const uint8_t* ahead, float* tile) {
  constexpr int64_t kVector = 2 * kLanes;
  const int64_t row_bytes = depth / 2, runs = depth / kFoldedBlock;
  Vec sums[kRows][kWeightRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kWeightRows; ++i) sums[r][i] = zero();
  }
  const auto multiply = [&](const BF16* x, const VecPairs(&values)[kWeightRows])
                            __attribute__((always_inline)) {
#pragma GCC unroll 8
                              for (int r = 0; r < kRows; ++r) {
                                const VecPairs xr = load_pairs(x + r * kVector);
#pragma GCC unroll 4
                                for (int i = 0; i < kWeightRows; ++i)
                                  sums[r][i] = dot_pairs(xr, values[i], sums[r][i]);
                              }
                            };
  int64_t run = 0;
  for (; run + 2 < runs; run += 2, packed += kFoldedChunk / 2) {
    PairTable tables[kWeightRows];
#pragma GCC unroll 4
    for (int i = 0; i < kWeightRows; ++i, ahead += kFoldedChunk / 2) {
      __builtin_prefetch(ahead);
      const int64_t at = i * runs + run;
      tables[i] = PairTable(codes.at(at), absmax[at], codes.at(at + 1), absmax[at + 1]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j, lhs += kRows * kVector) {
      VecPairs values[kWeightRows];
#pragma GCC unroll 4
      for (int i = 0; i < kWeightRows; ++i) {
        const VecI bytes = load_bytes(packed + i * row_bytes + j / 2);
        values[i] = tables[i].lookup_halves(j % 2 ? next_nibble16(bytes) : bytes);
      }
      multiply(lhs, values);
    }
  }
  for (; run < runs; ++run, packed += kFoldedBlock / 2, lhs += kRows * kFoldedBlock) {
    VecPairs even[kWeightRows], odd[kWeightRows];
#pragma GCC unroll 4
    for (int i = 0; i < kWeightRows; ++i, ahead += kFoldedBlock / 2) {
      __builtin_prefetch(ahead);
      PanelBF16 values[kFoldedBlock];
      EvenOddTable(codes.at(i * runs + run), absmax[i * runs + run]).decode(packed + i * row_bytes, values);
      even[i] = load_pairs(values);
      odd[i] = load_pairs(values + kVector);
    }
    multiply(lhs, even);
    multiply(lhs + kRows * kVector, odd);
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
    float four[4] = {};
    add_lane_sums(sums[r][0], kWeightRows > 1 ? sums[r][1 % kWeightRows] : zero(),
                  kWeightRows > 2 ? sums[r][2 % kWeightRows] : zero(),
                  kWeightRows > 3 ? sums[r][3 % kWeightRows] : zero(), four);
    for (int i = 0; i < kWeightRows; ++i) tile[r * kStrip + i] += four[i];
  }
}

// Up to kRows rows of lhs. `codes`: of the first column.
template <int kRows, class Codes>
void folded_rows(const GemmTerm& term, Codes codes, int64_t rows, int64_t n0, int64_t cols, const BF16* lhs,
                 const float* absmax, float* tile) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return folded_rows<kRows - 1>(term, codes, rows, n0, cols, lhs, absmax, tile);
  }
  // As many weight rows share the loads of lhs as there are registers for their sums.
  constexpr int kWeightRows = kRows <= 6 ? 4 : 3;
  constexpr int64_t kAhead = 4096;  // bytes, as in linear_gemv.inl
  const int64_t row_bytes = term.depth / 2, runs = term.depth / kFoldedBlock;
  const uint8_t* packed = term.rhs.nf4->packed + n0 * row_bytes;
  const int64_t ahead = max64(kAhead, kWeightRows * row_bytes);
  int64_t c = 0;
  const auto multiply = [&](auto count) {
    folded_tile<kRows, decltype(count)::kValue>(codes, packed, absmax, term.depth, lhs, packed + ahead,
                                                tile + c);
    c += count;
    codes.skip(count * runs);
    packed += count * row_bytes;
    absmax += count * runs;
  };
  while (c + kWeightRows <= cols) multiply(Constant<kWeightRows>{});
  while (c < cols) multiply(Constant<1>{});
}

inline void folded_add_term(const GemmTerm& term, int64_t rows, int64_t n0, int64_t cols, void* scratch,
                            float* tile) {
  const FoldedScratch s(term, rows, scratch);
  const float* absmax = folded_absmax(term, n0, cols, s);
  const int64_t pass = folded_pass(rows);
  const Nf4View& w = *term.rhs.nf4;
  const auto multiply = [&](const auto& codes) {
    for (int64_t r = 0; r < rows; r += pass) {
      folded_rows<kFoldedPass>(term, codes, min64(pass, rows - r), n0, cols, s.lhs + r * term.depth, absmax,
                               tile + r * kStrip);
    }
  };
  if (w.zero_points) {
    const int64_t blocks = term.depth >> w.block_shift;
    multiply(ShiftedCodes{w.codes, w.zero_points + n0 * blocks, w.block_shift - 6});
  } else {
    multiply(FoldedCodes{w.codes});
  }
}
