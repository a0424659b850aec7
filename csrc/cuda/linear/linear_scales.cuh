// How LinearSmall reads the scales of a weight. A lane has those of its rows' groups t of four groups, and
// gets the others by shuffles.
#pragma once

#include "linear_decode.cuh"

namespace peft_kernels::cuda {

// One for each group of 64, or for several: it multiplies the sums of the group, in fp32.
struct GroupScales {
  using Packed = PackedScale;
  using Value = float;
  using Map = float;

  const Nf4View& weight;
  const float offset;
  const uint32_t in_row, last;

  DEVICE GroupScales(const Nf4View& of, int k, int)
      : weight(of),
        offset(load_scale_offset(of)),
        in_row(static_cast<uint32_t>(k >> of.block_shift)),
        last(in_row - 1) {}

  template <class T>
  static DEVICE constexpr float code_factor() {
    return kCodeFactor<T>;
  }
  // What sums are multiplied by at the end.
  template <class T>
  DEVICE float sum_factor() const {
    return 1.0f / kCodeFactor<T>;
  }
  template <int kThreads>
  DEVICE void fill(Map* map) const {
    fill_map<kThreads>(weight, map);
  }
  // Of the group that starts at k; past the end arbitrary ones.
  DEVICE uint32_t place_of(int k) const {
    const uint32_t block = static_cast<uint32_t>(k) >> weight.block_shift;
    return block < last ? block : last;
  }
  DEVICE Packed load_at(uint32_t row, uint32_t place) const {
    return load_scale(weight, row * in_row + place);
  }
  DEVICE Value unpack(const Packed& packed, const Map* map) const {
    return unpack_scale(packed, map, offset);
  }
  DEVICE void apply(const Map*, Value, Value, uint32_t (&)[4][4]) const {}
  template <class T>
  DEVICE void multiply(const uint32_t (&codes)[4][4], const GroupOfX& x, Value scale, Value scale8,
                       float (&sums)[4]) const {
    multiply_group<T>(codes, x, scale, scale8, sums);
  }
};

// Codes for blocks of 16 or 32, with a table of values. A lane's 16 weights of a group are in one block, so
// it multiplies them by their own scale before the matrix instruction: exact in bf16, as the values of E2M1
// have two significant bits and those of E4M3 four. What all values of the table have as a factor, the scale
// of the whole weight, multiplies the sums at the end.
struct ScaleCodes {
  using Packed = uint32_t;  // 2 or 4 codes
  using Value = uint32_t;
  using Map = uint32_t;  // a value twice

  const Nf4View& weight;
  const uint32_t in_row, last;  // groups
  const int shift;              // to the lane's code
  const float one;

  DEVICE ScaleCodes(const Nf4View& of, int k, int t)
      : weight(of),
        in_row(static_cast<uint32_t>(k / kGroup)),
        last(in_row - 1),
        shift((16 * t >> of.block_shift) * 8),
        one(load_constant(of.scale_values + of.code_of_one)) {}

  template <class T>
  static DEVICE constexpr float code_factor() {
    return 1.0f;
  }
  template <class T>
  DEVICE float sum_factor() const {
    return one;
  }
  template <int kThreads>
  DEVICE void fill(Map* map) const {
    static_assert(kThreads == kScaleCodes);
    const float value = load_constant(weight.scale_values + thread_index());
    const float relative = one == 0.0f ? value : __fdiv_rn(value, one);
    store(map + thread_index(), pack2<bf16>(relative, relative));
  }
  DEVICE uint32_t place_of(int k) const {
    const uint32_t group = static_cast<uint32_t>(k / kGroup);
    return group < last ? group : last;
  }
  DEVICE Packed load_at(uint32_t row, uint32_t place) const {
    const uint64_t group = row * in_row + place;
    if (weight.block_shift == 4)
      return load_constant(reinterpret_cast<const uint32_t*>(weight.scale_code) + group);
    return load_constant(reinterpret_cast<const uint16_t*>(weight.scale_code) + group);
  }
  DEVICE Value unpack(const Packed& packed, const Map*) const { return packed; }
  // Multiplies the decoded weights of rows g and g + 8.
  DEVICE void apply(const Map* map, Value codes, Value codes8, uint32_t (&decoded)[4][4]) const {
    const uint32_t scale = load(map + (codes >> shift & 0xff)), scale8 = load(map + (codes8 >> shift & 0xff));
#pragma unroll
    for (int s = 0; s < 4; ++s) {
#pragma unroll
      for (int i = 0; i < 4; ++i) decoded[s][i] = multiply2<bf16>(decoded[s][i], i % 2 == 0 ? scale : scale8);
    }
  }
  template <class T>
  DEVICE void multiply(const uint32_t (&scaled)[4][4], const GroupOfX& x, Value, Value,
                       float (&sums)[4]) const {
#pragma unroll
    for (int s = 0; s < 4; ++s) multiply_step<T>(sums, scaled[s], x, s);
  }
};

}  // namespace peft_kernels::cuda
