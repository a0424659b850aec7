// The weight as the first operand of a warpgroup's matrix instructions: 64 features by 16 terms of their
// sums, decoded in registers. Of W for y = x W^T, of W^T for dx = dY W.
//
// The other operand is in shared memory in natural order, so the terms are in natural order too: lane (g, t)
// has terms 2t, 2t + 1, 2t + 8 and 2t + 9 of a step. The order of features is free: rows g and g + 8 of a
// warp's operand are its features 2g and 2g + 1, neighbours in a row of the result.
//
// Scales are rounded to 16 bits and multiply decoded weights, as in LinearDx: sums stay in the accumulators
// of the matrix instructions from the first term to the last.
#pragma once

#include "../hopper/hopper.cuh"
#include "linear_shared.cuh"

namespace peft_kernels::cuda {

#ifdef PEFT_KERNELS_HOPPER

struct WgmmaPlace {
  int feature, token;  // the first ones of a tile
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

  DEVICE void copy_weight(uint32_t to, const CUtensorMap& map, int feature, int term,
                          uint32_t barrier) const {
    copy_box(to, map, term / 2, feature, barrier);
  }
  // Scale i of the 128 of a stage.
  DEVICE PackedScale load_stage_scale(int i, int feature, int term) const {
    const int row = feature + i < p.n ? feature + i : p.n - 1;
    return load_scale(p.weight, static_cast<uint32_t>(row) * row_scales +
                                    (static_cast<uint32_t>(term) >> p.weight.block_shift));
  }
  DEVICE void store_stage_scale(uint8_t* scales, int i, float scale, int) const {
    store(reinterpret_cast<uint32_t*>(scales) + i, pack2<T>(scale, scale));
  }

  // ---- Decoding ----

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
  DEVICE void load_slab(int feature, int step, uint32_t (&a)[4]) const {
    const int g = lane_index() / 4, t = lane_index() % 4;
#  pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = feature + 2 * g + i < p.n ? feature + 2 * g + i : p.n - 1;
      const T* from = static_cast<const T*>(p.slab.v) + int64_t{row} * p.slab.depth + step * 16 + 2 * t;
      const bool exists = step * 16 < p.slab.depth;
      a[i] = exists ? load_constant(reinterpret_cast<const uint32_t*>(from)) : 0;
      a[i + 2] = exists ? load_constant(reinterpret_cast<const uint32_t*>(from + 8)) : 0;
    }
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

  DEVICE void copy_weight(uint32_t to, const CUtensorMap& map, int feature, int term,
                          uint32_t barrier) const {
    copy_box(to, map, feature / 2, term, barrier);
  }
  // Of row i % 64, for the columns of warpgroup i / 64.
  DEVICE PackedScale load_stage_scale(int i, int feature, int term) const {
    const int row = term + i % 64, column = feature + i / 64 * 64;
    return load_scale(p.weight,
                      static_cast<uint32_t>(row < p.n ? row : p.n - 1) * row_scales +
                          (static_cast<uint32_t>(column < p.k ? column : 0) >> p.weight.block_shift));
  }
  // In the order in which a lane needs them: its four rows of a step are neighbours. Rows past the end are
  // zero.
  DEVICE void store_stage_scale(uint8_t* scales, int i, float scale, int term) const {
    const int at = i / 16 * 16 + i % 8 / 2 * 4 + i / 8 % 2 * 2 + i % 2;
    store(reinterpret_cast<T*>(scales) + at, from_float<T>(term + i % 64 < p.n ? scale : 0.0f));
  }

  struct Lane {
    uint32_t codes, scales, table;
  };
  static DEVICE Lane lane_of(int warp, uint32_t table) {
    const uint32_t lane = static_cast<uint32_t>(lane_index()), g = lane / 4, t = lane % 4;
    const uint32_t unit = static_cast<uint32_t>(warp) / 2, byte = static_cast<uint32_t>(warp) % 2 * 8 + g;
    return {2 * t * 64 + (unit ^ t) * 16 + byte, static_cast<uint32_t>(warp) / 4 * 128 + t * 8, table};
  }
  static DEVICE void decode(const Lane& lane, uint32_t codes, uint32_t scales, uint32_t (&a)[4][4]) {
    const WideTable table{lane.table};
#  pragma unroll
    for (uint32_t s = 0; s < 4; ++s) {
      const uint32_t at = codes + lane.codes + s * 16 * 64;
      const Words2 scale = load_shared_8(scales + lane.scales + s * 32);
      // Bytes of two rows of even index and of the odd ones behind them; then codes of both side by side, of
      // the even column and the odd one.
      const uint32_t low = __byte_perm(load_shared_byte(at), load_shared_byte(at + 8 * 64), 0x7740),
                     high = __byte_perm(load_shared_byte(at + 64), load_shared_byte(at + 9 * 64), 0x7740);
      constexpr uint32_t kUpper = 0xf0f0f0f0u;
      const uint32_t even = select_bits(kUpper, low, high >> 4), odd = select_bits(kUpper, low << 4, high);
#  pragma unroll
      for (int i = 0; i < 2; ++i) {
        a[s][2 * i] = multiply2<T>(table.pair(even, i), scale.v[i]);
        a[s][2 * i + 1] = multiply2<T>(table.pair(odd, i), scale.v[i]);
      }
    }
  }

  // v[depth, features], likewise.
  DEVICE void load_slab(int feature, int step, uint32_t (&a)[4]) const {
    const int g = lane_index() / 4, t = lane_index() % 4;
    const int column = feature + 2 * g < p.k ? feature + 2 * g : 0;
#  pragma unroll
    for (int i = 0; i < 2; ++i) {
      const T* from = static_cast<const T*>(p.slab.v) + int64_t{step * 16 + 2 * t + 8 * i} * p.k + column;
      const bool exists = step * 16 < p.slab.depth;
      const uint32_t row = exists ? load_constant(reinterpret_cast<const uint32_t*>(from)) : 0,
                     row1 = exists ? load_constant(reinterpret_cast<const uint32_t*>(from + p.k)) : 0;
      a[2 * i] = __byte_perm(row, row1, 0x5410);
      a[2 * i + 1] = __byte_perm(row, row1, 0x7632);
    }
  }
};

#endif

}  // namespace peft_kernels::cuda
