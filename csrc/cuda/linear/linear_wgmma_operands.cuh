// The weight as the first operand of a warpgroup's matrix instructions: 64 features by 16 terms of their
// sums, decoded in registers. Of W for y = x W^T, of W^T for dx = dY W.
//
// The other operand is in shared memory in natural order, so the terms are in natural order too: lane (g, t)
// has terms 2t, 2t + 1, 2t + 8 and 2t + 9 of a step. The order of features is free: rows g and g + 8 of a
// warp's operand are neighbours in a row of the result, lane_feature() and the next.
//
// Scales are rounded to 16 bits and multiply decoded weights, as in LinearDx: sums stay in the accumulators
// of the matrix instructions from the first term to the last.
#pragma once

#include "../hopper/hopper.cuh"
#include "linear_groups.cuh"

namespace peft_kernels::cuda {

#ifdef PEFT_KERNELS_HOPPER

struct WgmmaPlace {
  int feature, token;  // the first ones of a tile
  int end;             // of tokens, or more
  int expert;          // or 0
};

// Rows of the weight are features, its columns the terms. The box of a stage: 128 rows of 32 bytes, in which
// the two units of 16 bytes are exchanged in every second four rows.
template <class T>
struct WgmmaForward {
  const LinearParams& p;
  uint32_t row_scales;

  DEVICE explicit WgmmaForward(const LinearParams& params)
      : p(params), row_scales(static_cast<uint32_t>(params.k >> params.weight.block_shift)) {}

  DEVICE int features() const { return p.n; }
  DEVICE int terms() const { return p.k; }

  // ---- Loading ----

  // The map has the weights of all experts, one below the other.
  DEVICE void copy_weight(uint32_t to, const CUtensorMap& map, const WgmmaPlace& place, int term,
                          uint32_t barrier) const {
    copy_box(to, map, term / 2, place.expert * p.n + place.feature, barrier);
  }
  // Scale i of the 128 of a stage.
  DEVICE PackedScale load_stage_scale(const Nf4View& weight, int i, int feature, int term) const {
    const int row = feature + i < p.n ? feature + i : p.n - 1;
    return load_scale(weight, static_cast<uint32_t>(row) * row_scales +
                                  (static_cast<uint32_t>(term) >> p.weight.block_shift));
  }
  DEVICE void store_stage_scale(uint8_t* scales, int i, float scale, int) const {
    store(reinterpret_cast<uint32_t*>(scales) + i, pack2<T>(scale, scale));
  }

  // ---- Decoding ----

  // Of a tile, the first of the lane's two neighbours.
  static DEVICE int lane_feature(int warp) { return warp * 16 + lane_index() / 4 * 2; }

  // The lane's constants: addresses in a stage, and the selector of its byte of a word.
  struct Lane {
    uint32_t codes, scales, table, selector;
  };
  static DEVICE Lane lane_of(int warp, uint32_t table) {
    const uint32_t lane = static_cast<uint32_t>(lane_index()), g = lane / 4, t = lane % 4;
    const uint32_t row = static_cast<uint32_t>(warp) * 16 + 2 * g;
    return {row * 32 + g / 2 % 2 * 16, row * 4, table, 0x7604 | t << 4};
  }
  static DEVICE void decode(const Lane& lane, uint32_t codes, uint32_t scales, uint32_t (&a)[4][4]) {
    const uint32_t at = codes + lane.codes;
    const Words2 scale = load_shared_8(scales + lane.scales);
#  pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t unit = half == 0 ? at : at ^ 16;
      const Words4 row = load_shared_16(unit), row1 = load_shared_16(unit + 32);
#  pragma unroll
      for (int i = 0; i < 2; ++i) {
        uint32_t (&to)[4] = a[2 * half + i];
        to[0] = multiply2<T>(pair(lane, row.v[2 * i]), scale.v[0]);
        to[1] = multiply2<T>(pair(lane, row1.v[2 * i]), scale.v[1]);
        to[2] = multiply2<T>(pair(lane, row.v[2 * i + 1]), scale.v[0]);
        to[3] = multiply2<T>(pair(lane, row1.v[2 * i + 1]), scale.v[1]);
      }
    }
  }
  static DEVICE uint32_t pair(const Lane& lane, uint32_t word) {
    return load_shared(__byte_perm(word, lane.table, lane.selector));
  }

  // ---- The low-rank term ----

  // v[features, depth], 16 of its depth; zeros past the end.
  // `feature` is the lane's first.
  DEVICE void load_slab(int feature, int step, uint32_t (&a)[4]) const {
    const int t = lane_index() % 4;
#  pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = feature + i < p.n ? feature + i : p.n - 1;
      const auto* from = static_cast<const bf16*>(p.slab.v) + int64_t{row} * p.slab.depth + step * 16 + 2 * t;
      const bool exists = step * 16 < p.slab.depth;
      a[i] = exists ? load_constant(reinterpret_cast<const uint32_t*>(from)) : 0;
      a[i + 2] = exists ? load_constant(reinterpret_cast<const uint32_t*>(from + 8)) : 0;
    }
  }
  // Adds the delta of an expert's adapter to the sums of a warp's 16 features. Tokens are those of the lane
  // as in linear_slab.cuh.
  template <class Groups, class Token, class Sums>
  static DEVICE void add_delta(const Groups& groups, int expert, int feature, const Token& token,
                               Sums& sums) {
    const int last = groups.p.n - 1;
    const auto row = [&](int i) { return feature + i < last ? feature + i : last; };
    groups.template add_delta<T>(expert, 0, 1, row, token, sums);
  }
};

// Columns of the weight are features, its rows the terms. The box of a stage: 64 rows of 64 bytes, whose
// units of 16 bytes are permuted as in every swizzle by 64 bytes: unit u of row r is at u ^ r / 2 % 4.
template <class T>
struct WgmmaBackward {
  const LinearParams& p;
  uint32_t row_scales;

  DEVICE explicit WgmmaBackward(const LinearParams& params)
      : p(params), row_scales(static_cast<uint32_t>(params.k >> params.weight.block_shift)) {}

  DEVICE int features() const { return p.k; }
  DEVICE int terms() const { return p.n; }

  DEVICE void copy_weight(uint32_t to, const CUtensorMap& map, const WgmmaPlace& place, int term,
                          uint32_t barrier) const {
    copy_box(to, map, place.feature / 2, place.expert * p.n + term, barrier);
  }
  // Of row i % 64, for the columns of warpgroup i / 64.
  DEVICE PackedScale load_stage_scale(const Nf4View& weight, int i, int feature, int term) const {
    const int row = term + i % 64, column = feature + i / 64 * 64;
    return load_scale(weight, static_cast<uint32_t>(row < p.n ? row : p.n - 1) * row_scales +
                                  (static_cast<uint32_t>(column < p.k ? column : 0) >> p.weight.block_shift));
  }
  // In the order in which a lane needs them: its eight rows of two steps are neighbours. Rows past the end
  // are zero.
  DEVICE void store_stage_scale(uint8_t* scales, int i, float scale, int term) const {
    const int at = i / 32 * 32 + i % 8 / 2 * 8 + i / 8 % 4 * 2 + i % 2;
    store(reinterpret_cast<T*>(scales) + at, from_float<T>(term + i % 64 < p.n ? scale : 0.0f));
  }

  // ---- Decoding ----
  // Two warps share units of 16 bytes of each row: lane (g, t) gets bytes 2g and 2g + 1, of which the first
  // warp decodes the one and the second the other.

  static DEVICE int lane_feature(int warp) { return warp / 2 * 32 + lane_index() / 4 * 4 + warp % 2 * 2; }

  struct Lane {
    uint32_t codes, scales, table, selector;
  };
  static DEVICE Lane lane_of(int warp, uint32_t table) {
    const uint32_t lane = static_cast<uint32_t>(lane_index()), unit = static_cast<uint32_t>(warp) / 2;
    return {lane * 64 + (unit ^ lane / 2 % 4) * 16, static_cast<uint32_t>(warp) / 4 * 128 + lane % 4 * 16,
            table, 0x6240 + 0x1111 * (static_cast<uint32_t>(warp) % 2)};
  }
  static DEVICE void decode(const Lane& lane, uint32_t codes, uint32_t scales, uint32_t (&a)[4][4]) {
    const WideTable table{lane.table};
#  pragma unroll
    for (uint32_t half = 0; half < 2; ++half) {
      // Of eight rows each, those of even index below those of odd index.
      const Words4 rows = load_transposed(codes + lane.codes + half * 32 * 64),
                   scale = load_shared_16(scales + lane.scales + half * 64);
      const uint32_t first = __byte_perm(rows.v[0], rows.v[1], lane.selector),
                     second = __byte_perm(rows.v[2], rows.v[3], lane.selector);
      // Bytes of the rows of even index, and of the odd rows that follow them; then the codes of both rows
      // side by side, of the even column and of the odd one.
      const uint32_t low = __byte_perm(first, second, 0x5410), high = __byte_perm(first, second, 0x7632);
      constexpr uint32_t kUpper = 0xf0f0f0f0u;
      const uint32_t even = select_bits(kUpper, low, high >> 4), odd = select_bits(kUpper, low << 4, high);
#  pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint32_t* to = a[2 * half + i / 2] + i % 2 * 2;
        to[0] = multiply2<T>(table.pair(even, i), scale.v[i]);
        to[1] = multiply2<T>(table.pair(odd, i), scale.v[i]);
      }
    }
  }

  // v[depth, features], likewise.
  DEVICE void load_slab(int feature, int step, uint32_t (&a)[4]) const {
    const int t = lane_index() % 4;
    const int column = feature < p.k ? feature : 0;
#  pragma unroll
    for (int i = 0; i < 2; ++i) {
      const auto* from =
          static_cast<const bf16*>(p.slab.v) + int64_t{step * 16 + 2 * t + 8 * i} * p.k + column;
      const bool exists = step * 16 < p.slab.depth;
      const uint32_t row = exists ? load_constant(reinterpret_cast<const uint32_t*>(from)) : 0,
                     row1 = exists ? load_constant(reinterpret_cast<const uint32_t*>(from + p.k)) : 0;
      a[2 * i] = __byte_perm(row, row1, 0x5410);
      a[2 * i + 1] = __byte_perm(row, row1, 0x7632);
    }
  }
  template <class Groups, class Token, class Sums>
  static DEVICE void add_delta(const Groups& groups, int expert, int feature, const Token& token,
                               Sums& sums) {
    groups.template add_delta_dx<T>(expert, 0, 1, feature < groups.p.k ? feature : 0, token, sums);
  }
};

#endif

}  // namespace peft_kernels::cuda
