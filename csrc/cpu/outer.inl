// Micro-kernel with vectors along the output's columns. A panel holds strips of kStrip columns, one row of a
// strip after the other:
//
//   lhs[r, p] (broadcast)   x   strip[p, 0 .. kOuterVecs * kLanes)   ->   kOuterRows x kOuterVecs vectors of
//   sums

constexpr int64_t kStrip = 64;  // columns; one absmax block of the default size
static_assert(kStrip % (kOuterVecs * kLanes) == 0, "");

template <class T>
void widen_strips(const T* x, int64_t ld, float scale, int64_t depth, int64_t cols, float* out) {
  const Vec s = splat(scale);
  for (int64_t c = 0; c < cols; c += kStrip) {
    for (int64_t p = 0; p < depth; ++p, out += kStrip) {
      for (int64_t i = 0; i < kStrip; i += kLanes) {
        const int64_t left = cols - c - i;
        const T* from = x + p * ld + c + i;
        store(out + i, left <= 0 ? zero() : mul(load_lanes(from, min64(kLanes, left)), s));
      }
    }
  }
}

struct OuterF32 {
  using Value = float;                  // of lhs and panel
  static constexpr int kPair = 1;       // rows of rhs that share a lane
  static constexpr int kDepthUnit = 1;  // of what is multiplied at once, padded with zeros
  static constexpr int kTileRows = kOuterRows;
  // Whether multiply reads the lhs of all rows of a register tile, also of those it is not asked for.
  static constexpr bool kWholeTiles = false;
  static constexpr int64_t kChain = 32;  // terms of one running sum
  static Vec splat_lhs(const float* p) { return splat(*p); }
  static Vec load_rhs(const float* p) { return load(p); }
  static Vec mac(Vec a, Vec b, Vec sum) { return fma(a, b, sum); }

  static void pack_lhs(const void* lhs, DType dtype, int64_t first, int64_t count, float* out) {
    widen_run(lhs, dtype, first, count, 1.0f, out);
  }
  // lhs from element `first`, where it can be read as it lies.
  static const float* direct_lhs(const GemmTerm& term, int64_t first) {
    return term.lhs_dtype == DType::kF32 ? static_cast<const float*>(term.lhs) + first : nullptr;
  }
  // Fills one step of a strip from rhs, from element `first` on. `cols` of its columns exist.
  static void fill_step(const MatrixView& rhs, float scale, int64_t first, int64_t /*rows*/, int64_t cols,
                        float* out) {
    fill_panel_row(rhs, first, cols, scale, out);
    memset(out + cols, 0, (kStrip - cols) * sizeof(float));
  }
  // A whole panel at once, if rhs is dense: strips of kStrip columns, `depth` rows each.
  static bool fill_dense(const MatrixView& rhs, float scale, int64_t first, int64_t depth, int64_t cols,
                         float* out) {
    if (rhs.nf4) return false;
    switch (rhs.dtype) {
      case DType::kF32:
        widen_strips(static_cast<const float*>(rhs.data) + first, rhs.ld, scale, depth, cols, out);
        break;
      case DType::kBF16:
        widen_strips(static_cast<const BF16*>(rhs.data) + first, rhs.ld, scale, depth, cols, out);
        break;
      case DType::kF16:
        widen_strips(static_cast<const F16*>(rhs.data) + first, rhs.ld, scale, depth, cols, out);
    }
    return true;
  }
  // tile[r][c] += lhs[r] . strip[:, c] for `rows` rows and a whole strip.
  static void multiply(int64_t rows, const float* lhs, int64_t lhs_ld, const float* strip, int64_t steps,
                       float* tile, int64_t tile_ld);
};

// tile[r][c] += sum over p of lhs[r][p] * strip[p][c], in partial sums of kChain terms. One running fp32 sum
// over thousands of rows (dA and dB sum over all tokens) would lose a bit for every fourfold; and a chain
// that followed the blocking would make a row's bits depend on how many rows a thread was given.
template <class Outer, int kRows>
void outer_tile(const typename Outer::Value* lhs, int64_t lhs_ld, const typename Outer::Value* strip,
                int64_t steps, float* tile, int64_t tile_ld) {
  constexpr int64_t kChainSteps = Outer::kChain / Outer::kPair;
  for (int64_t left = steps; left > 0; left -= kChainSteps) {
    Vec sums[kRows][kOuterVecs];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kOuterVecs; ++v) sums[r][v] = splat(0.0f);
    }
    const int64_t count = min64(left, kChainSteps);
    for (int64_t s = 0; s < count; ++s, strip += kStrip * Outer::kPair, lhs += Outer::kPair) {
      decltype(Outer::load_rhs(strip)) b[kOuterVecs];
#pragma GCC unroll 4
      for (int v = 0; v < kOuterVecs; ++v) b[v] = Outer::load_rhs(strip + v * kLanes * Outer::kPair);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const auto a = Outer::splat_lhs(lhs + r * lhs_ld);
#pragma GCC unroll 4
        for (int v = 0; v < kOuterVecs; ++v) sums[r][v] = Outer::mac(a, b[v], sums[r][v]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kOuterVecs; ++v) {
        float* out = tile + r * tile_ld + v * kLanes;
        store(out, add(load(out), sums[r][v]));
      }
    }
  }
}

// Any number of rows up to kRows, and a whole strip.
template <class Outer, int kRows>
void outer_rows(int64_t rows, const typename Outer::Value* lhs, int64_t lhs_ld,
                const typename Outer::Value* strip, int64_t steps, float* tile, int64_t tile_ld) {
  if constexpr (kRows > 1) {
    if (rows < kRows) return outer_rows<Outer, kRows - 1>(rows, lhs, lhs_ld, strip, steps, tile, tile_ld);
  }
  for (int64_t v = 0; v < kStrip; v += kOuterVecs * kLanes) {
    outer_tile<Outer, kRows>(lhs, lhs_ld, strip + v * Outer::kPair, steps, tile + v, tile_ld);
  }
}

inline void OuterF32::multiply(int64_t rows, const float* lhs, int64_t lhs_ld, const float* strip,
                               int64_t steps, float* tile, int64_t tile_ld) {
  outer_rows<OuterF32, kTileRows>(rows, lhs, lhs_ld, strip, steps, tile, tile_ld);
}
