// A packed weight times one to four rows of lhs, as in generation: the weight is read once and never written out.
//
// A chunk is one vector of packed bytes, eight codes to a 32-bit lane. Shifting by a nibble eight times brings each
// code to the bottom, where a permute turns it into its fp32 value. The codes of one shift belong to elements eight
// apart, so lhs is laid out that way once per call. The scale follows after the eight products of a lane, which lie
// in one block:
//
//   lane l, shift j:  element 8 l + (j ^ 1)        (the high nibble of a byte is the even element)

constexpr int64_t kGemvMaxRows = 4;
constexpr int64_t kChunk = 8 * kLanes;      // elements
constexpr int64_t kGemvMaxWeightRows = 4;   // rows of the weight that share the loads of lhs

struct GemvLayout {
  int64_t chunks;        // in a row, the last one padded
  int64_t lhs_floats;    // of one row of lhs as arranged
  int64_t scale_floats;  // of one weight row
};

inline GemvLayout gemv_layout(int64_t depth) {
  const int64_t chunks = (depth + kChunk - 1) / kChunk;
  return {chunks, chunks * kChunk, round_up(chunks * kChunk / nf4::kMinBlocksize, 16)};
}

// Rows that do not start with a block go through the panel.
inline bool gemv_serves(const GemmTerm& term, const Rect& rect) {
  if (!term.rhs.nf4 || rect.m1 - rect.m0 > kGemvMaxRows) return false;
  if (term.rhs.ld % (int64_t{1} << term.rhs.nf4->block_shift) != 0) return false;
  const GemvLayout layout = gemv_layout(term.depth);
  const int64_t floats = kGemvMaxRows * layout.lhs_floats + kGemvMaxWeightRows * layout.scale_floats;
  return floats * static_cast<int64_t>(sizeof(float)) <= kGemvScratchBytes;
}

inline void gemv_arrange_lhs(const GemmTerm& term, const Rect& rect, float* arranged) {
  const GemvLayout layout = gemv_layout(term.depth);
  for (int64_t m = rect.m0; m < rect.m1; ++m, arranged += layout.lhs_floats) {
    for (int64_t chunk = 0; chunk < layout.chunks; ++chunk) {
      float natural[kChunk] = {};
      const int64_t first = chunk * kChunk;
      widen_run(term.lhs, term.lhs_dtype, m * term.lhs_ld + first, min64(kChunk, term.depth - first), 1.0f, natural);
      float* out = arranged + first;
      for (int j = 0; j < 8; ++j) {
        for (int lane = 0; lane < kLanes; ++lane) out[j * kLanes + lane] = natural[8 * lane + (j ^ 1)];
      }
    }
  }
}

// kWeightRows rows of the weight against kRows rows of lhs; out[r][w] += their products.
template <int kRows, int kWeightRows, int kBlocks>
void gemv_tile(const Nf4View& w, const uint8_t* packed, int64_t depth, const GemvLayout& layout, const float* lhs,
               const float* scales, float* out) {
  const CodeTable table;
  const int64_t row_bytes = depth / 2;
  Vec sums[kRows][kWeightRows];
#pragma GCC unroll 4
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int i = 0; i < kWeightRows; ++i) sums[r][i] = zero();
  }
  const auto add_chunk = [&](int64_t chunk, const uint8_t* bytes, int64_t bytes_ld) __attribute__((always_inline)) {
    VecI bits[kWeightRows];
    Vec products[kRows][kWeightRows];
#pragma GCC unroll 4
    for (int i = 0; i < kWeightRows; ++i) {
      bits[i] = load_bytes(bytes + i * bytes_ld);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) products[r][i] = zero();
    }
    const float* x = lhs + chunk * kChunk;
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      Vec values[kWeightRows];
#pragma GCC unroll 4
      for (int i = 0; i < kWeightRows; ++i) {
        values[i] = lookup_code(table, bits[i]);
        bits[i] = next_nibble(bits[i]);
      }
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) {
        const Vec xj = load(x + r * layout.lhs_floats + j * kLanes);
#pragma GCC unroll 4
        for (int i = 0; i < kWeightRows; ++i) products[r][i] = fma(xj, values[i], products[r][i]);
      }
    }
    const int64_t block = (chunk * kChunk) >> w.block_shift;
#pragma GCC unroll 4
    for (int i = 0; i < kWeightRows; ++i) {
      const Vec scale = spread_scales<kBlocks>(scales + i * layout.scale_floats + block);
#pragma GCC unroll 4
      for (int r = 0; r < kRows; ++r) sums[r][i] = fma(products[r][i], scale, sums[r][i]);
    }
  };
  const int64_t whole = depth / kChunk;
  for (int64_t chunk = 0; chunk < whole; ++chunk) add_chunk(chunk, packed + chunk * kChunk / 2, row_bytes);
  if (whole < layout.chunks) {  // a copy: the packed weight may end here
    uint8_t bytes[kWeightRows][kChunk / 2] = {};
    for (int i = 0; i < kWeightRows; ++i) {
      memcpy(bytes[i], packed + i * row_bytes + whole * kChunk / 2, row_bytes - whole * kChunk / 2);
    }
    add_chunk(whole, bytes[0], kChunk / 2);
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

// How many weight rows share the loads of lhs: as many as the registers take.
template <int kRows>
constexpr int gemv_weight_rows() {
  constexpr int kMost = kLanes == 16 ? 8 / kRows : 2 / kRows;
  return kMost >= 4 ? 4 : kMost >= 2 ? 2 : 1;
}

template <int kRows, int kBlocks>
void gemv_rows(const GemmTerm& term, int64_t n0, int64_t cols, float* scratch, float* tile) {
  constexpr int kWeightRows = gemv_weight_rows<kRows>();
  const Nf4View& w = *term.rhs.nf4;
  const GemvLayout layout = gemv_layout(term.depth);
  const int64_t blocks = term.depth >> w.block_shift;
  float* scales = scratch + kRows * layout.lhs_floats;
  for (int64_t c = 0; c < cols;) {
    const int64_t count = cols - c >= kWeightRows ? kWeightRows : 1;
    for (int64_t i = 0; i < count; ++i) {
      const int64_t first_block = (n0 + c + i) * blocks;
      float* row = scales + i * layout.scale_floats;
      for (int64_t b = 0; b < blocks; ++b) row[b] = block_absmax(w, first_block + b);
      for (int64_t b = blocks; b < layout.scale_floats; ++b) row[b] = 0.0f;
    }
    const uint8_t* packed = w.packed + (n0 + c) * term.depth / 2;
    if (count == kWeightRows) {
      gemv_tile<kRows, kWeightRows, kBlocks>(w, packed, term.depth, layout, scratch, scales, tile + c);
    } else {
      gemv_tile<kRows, 1, kBlocks>(w, packed, term.depth, layout, scratch, scales, tile + c);
    }
    c += count;
  }
}

template <int kBlocks>
void gemv_blocks(const GemmTerm& term, int64_t rows, int64_t n0, int64_t cols, float* scratch, float* tile) {
  switch (rows) {
    case 1:
      return gemv_rows<1, kBlocks>(term, n0, cols, scratch, tile);
    case 2:
      return gemv_rows<2, kBlocks>(term, n0, cols, scratch, tile);
    case 3:
      return gemv_rows<3, kBlocks>(term, n0, cols, scratch, tile);
    case 4:
      return gemv_rows<4, kBlocks>(term, n0, cols, scratch, tile);
  }
}

// `scratch` holds the arranged lhs, and takes the scales behind it.
inline void gemv_add_term(const GemmTerm& term, int64_t rows, int64_t n0, int64_t cols, float* scratch, float* tile) {
  const int64_t blocks_in_chunk = kChunk >> term.rhs.nf4->block_shift;
  if (blocks_in_chunk <= 1) return gemv_blocks<1>(term, rows, n0, cols, scratch, tile);
  if constexpr (kChunk >= 2 * nf4::kMinBlocksize) {
    if (blocks_in_chunk == 2) return gemv_blocks<2>(term, rows, n0, cols, scratch, tile);
  }
  if constexpr (kChunk >= 4 * nf4::kMinBlocksize) gemv_blocks<4>(term, rows, n0, cols, scratch, tile);
}
