// Micro-kernel with vectors along the output's columns. A panel holds strips of kStrip columns, one row of a
// strip after another:
//
//   lhs[r, p] (broadcast) x strip[p, 0 .. kOuterVecs * kLanes) -> kOuterRows x kOuterVecs vectors of sums

constexpr int64_t kStrip = 64;  // columns; one block of the default size
static_assert(kStrip % (kOuterVecs * kLanes) == 0, "");

// What to prefetch: one cache line per step.
struct Prefetch {
  const char* at;
  int64_t stride;  // bytes from one step to the next
};
// Prefetches only lines that are already cached.
inline Prefetch no_prefetch(const void* near) { return {static_cast<const char*>(near), 0}; }

// tile[r][lane] += sum over steps of rows[r] * strip[lane], for kVectors vectors of lanes, in partial sums of
// Unit::kChain steps. A single fp32 sum over thousands of rows (dA and dB sum over all tokens) would lose a
// bit for every factor of four, and chains that followed the blocking would make a row's bits depend on how
// many rows a thread was given. Without `adds` the tile is overwritten. A stride may be a Constant.
template <class Unit, int kRows, int kVectors, class RowsLd, class Strip, class StripLd>
void sum_steps(const typename Unit::Value* rows, RowsLd rows_ld, const Strip* strip, StripLd strip_ld,
               int64_t steps, bool adds, float* tile, int64_t tile_ld, Prefetch fetch) {
  constexpr int kVectorLd = kLanes * sizeof(float) / sizeof(Strip);
  for (int64_t left = steps; left > 0; left -= Unit::kChain, adds = true) {
    Vec sums[kRows][kVectors];
#pragma GCC unroll 24
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[r][v] = zero();
    }
    const int64_t count = min64(left, Unit::kChain);
    for (int64_t s = 0; s < count;
         ++s, rows += Unit::kElements, strip += strip_ld, fetch.at += fetch.stride) {
      __builtin_prefetch(fetch.at, 0, 2);
      decltype(Unit::load_steps(strip)) lanes[kVectors];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) lanes[v] = Unit::load_steps(strip + v * kVectorLd);
#pragma GCC unroll 24
      for (int r = 0; r < kRows; ++r) {
        const auto step = Unit::splat_step(rows + r * rows_ld);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) sums[r][v] = Unit::mac(step, lanes[v], sums[r][v]);
      }
    }
#pragma GCC unroll 24
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        float* out = tile + r * tile_ld + v * kLanes;
        store(out, adds ? add(load(out), sums[r][v]) : sums[r][v]);
      }
    }
  }
}

// Up to kVectors vectors of a strip.
template <class Outer, int kRows, int kVectors>
void outer_vectors(int64_t vectors, const typename Outer::Value* lhs, int64_t lhs_ld,
                   const typename Outer::Value* strip, int64_t steps, bool adds, float* tile, int64_t tile_ld,
                   Prefetch fetch) {
  if constexpr (kVectors > 1) {
    if (vectors < kVectors) {
      return outer_vectors<Outer, kRows, kVectors - 1>(vectors, lhs, lhs_ld, strip, steps, adds, tile,
                                                       tile_ld, fetch);
    }
  }
  sum_steps<Outer, kRows, kVectors>(lhs, lhs_ld, strip, Constant<kStrip * Outer::kElements>{}, steps, adds,
                                    tile, tile_ld, fetch);
}

// Up to kRows rows, and the vectors of a strip that hold some of its first `cols` columns.
template <class Outer, int kRows>
void outer_rows(int64_t rows, int64_t cols, const typename Outer::Value* lhs, int64_t lhs_ld,
                const typename Outer::Value* strip, int64_t steps, bool adds, float* tile, int64_t tile_ld,
                Prefetch fetch) {
  if constexpr (kRows > 1) {
    if (rows < kRows) {
      return outer_rows<Outer, kRows - 1>(rows, cols, lhs, lhs_ld, strip, steps, adds, tile, tile_ld, fetch);
    }
  }
  for (int64_t v = 0; v < min64(cols, kStrip); v += kOuterVecs * kLanes) {
    outer_vectors<Outer, kRows, kOuterVecs>(ceil_div(cols - v, kLanes), lhs, lhs_ld,
                                            strip + v * Outer::kElements, steps, adds, tile + v, tile_ld,
                                            fetch);
  }
}

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

struct OuterF32 : FloatSteps {
  static constexpr int kDepthUnit = 1;  // of what is multiplied at once, padded with zeros
  static constexpr int kTileRows = kOuterRows;
  // Whether multiply reads the lhs of all rows of a register tile, even of those beyond `rows`.
  static constexpr bool kWholeTiles = false;
  static constexpr int64_t kChain = 32;  // steps of one running sum

  static void pack_lhs(const void* lhs, DType dtype, int64_t first, int64_t count, float* out) {
    widen_run(lhs, dtype, first, count, 1.0f, out);
  }
  // lhs from element `first`, where it can be read in place; else null.
  static const float* direct_lhs(const GemmTerm& term, int64_t first) {
    return term.lhs_dtype == DType::kF32 ? static_cast<const float*>(term.lhs) + first : nullptr;
  }
  // Fills one step of a strip from rhs, from element `first` on. `cols` of its columns exist.
  static void fill_step(const MatrixView& rhs, float scale, int64_t first, int64_t /*rows*/, int64_t cols,
                        float* out) {
    fill_panel_row(rhs, first, cols, scale, out);
    memset(out + cols, 0, (kStrip - cols) * sizeof(float));
  }
  // Fills a whole panel, if rhs is dense: strips of kStrip columns, `depth` rows each.
  static bool fill_dense(const MatrixView& rhs, float scale, int64_t first, int64_t depth, int64_t cols,
                         float* out) {
    if (rhs.nf4) return false;
    with_type(rhs.dtype, [&](auto type) {
      widen_strips(static_cast<const decltype(type)*>(rhs.data) + first, rhs.ld, scale, depth, cols, out);
    });
    return true;
  }
  // tile[r][c] += lhs[r] . strip[:, c] for `rows` rows and the first `cols` columns of a strip; without
  // `adds` the tile is overwritten.
  static void multiply(int64_t rows, int64_t cols, const float* lhs, int64_t lhs_ld, const float* strip,
                       int64_t steps, bool adds, float* tile, int64_t tile_ld, Prefetch fetch) {
    outer_rows<OuterF32, kTileRows>(rows, cols, lhs, lhs_ld, strip, steps, adds, tile, tile_ld, fetch);
  }
};

#if !PEFT_KERNELS_BF16_DOT
using OuterBF16 = OuterF32;
#endif
