// Rotary position embedding, as in peft_kernels/ops/block/rotary.py.
#pragma once

#include "../core/vectors.cuh"
#include "rotary.h"

namespace peft_kernels::cuda {

// a + b of two pairs, each sum rounded once. For bf16 as a * 1 + b, which sm_80 supports.
template <class T>
DEVICE uint32_t add2(uint32_t a, uint32_t b);
template <>
DEVICE uint32_t add2<bf16>(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(0x3f803f80u), "r"(b));
  return r;
}
template <>
DEVICE uint32_t add2<fp16>(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("add.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

// kWidth elements where torch computes in 16 bits: in pairs, of which a single element is the lower half.
template <class T, int kWidth>
struct PairsOf {
  static constexpr int kPairs = (kWidth + 1) / 2;
  Vec<uint32_t, kPairs> pairs;

  DEVICE explicit PairsOf(const T* from) {
    const auto loaded = load_constant(reinterpret_cast<const Vec<T, kWidth>*>(from));
    if constexpr (kWidth == 1) {
      pairs.v[0] = loaded.v[0].bits;
    } else {
      pairs = bit_cast<Vec<uint32_t, kPairs>>(loaded);
    }
  }
  DEVICE void negate() {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) pairs.v[i] ^= 0x80008000u;
  }
  // this * cos + other * sin.
  DEVICE PairsOf turned(const PairsOf& cos, const PairsOf& other, const PairsOf& sin) const {
    PairsOf sum = *this;
#pragma unroll
    for (int i = 0; i < kPairs; ++i) {
      sum.pairs.v[i] =
          add2<T>(multiply2<T>(pairs.v[i], cos.pairs.v[i]), multiply2<T>(other.pairs.v[i], sin.pairs.v[i]));
    }
    return sum;
  }
  template <class Out>
  DEVICE void write(Out* to) const {
    if constexpr (std::is_same_v<T, Out> && kWidth > 1) {
      store(reinterpret_cast<Vec<uint32_t, kPairs>*>(to), pairs);
    } else {
      float values[kWidth];
#pragma unroll
      for (int i = 0; i < kWidth; ++i) {
        values[i] = i % 2 ? high_half<T>(pairs.v[i / 2]) : low_half<T>(pairs.v[i / 2]);
      }
      store_floats(to, values);
    }
  }
};

// In fp32: products are rounded before they are added.
template <int kWidth>
struct FloatsOf {
  float v[kWidth];

  template <class From>
  DEVICE explicit FloatsOf(const From* from) {
    load_floats(from, v);
  }
  DEVICE void negate() {
#pragma unroll
    for (int i = 0; i < kWidth; ++i) v[i] = -v[i];
  }
  DEVICE FloatsOf turned(const FloatsOf& cos, const FloatsOf& other, const FloatsOf& sin) const {
    FloatsOf sum = *this;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) {
      sum.v[i] = __fadd_rn(__fmul_rn(v[i], cos.v[i]), __fmul_rn(other.v[i], sin.v[i]));
    }
    return sum;
  }
  template <class Out>
  DEVICE void write(Out* to) const {
    store_floats(to, v);
  }
};

// A block has some rows of one sequence in one of the tensors. A thread rotates kWidth pairs of elements of
// up to kHeads heads, with the same angles.
template <class T, class Angle, int kWidth>
struct RotaryHalves {
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerSm = 3;
  static constexpr int kMostTensors = 4;
  static constexpr int kHeads = 4;

  struct Tensor {
    RotaryHeads of;
    int first_block;  // more than there are for a tensor that is not there
    int row_blocks;   // blocks of a sequence
    int rows_of_block;
    int parts;  // threads that share the heads of a row, in turn
  };
  struct Params {
    Tensor tensors[kMostTensors];
    int64_t rows;
    int half;  // of the features
    RotaryAngles cos, sin;
    bool inverse;
    DType out_dtype;
  };

  static DEVICE void run(const Params& p) {
    Tensor tensor = p.tensors[0];
#pragma unroll
    for (int i = 1; i < kMostTensors; ++i) {
      if (block_index() >= p.tensors[i].first_block) tensor = p.tensors[i];
    }
    const unsigned block = block_index() - tensor.first_block, row_blocks = tensor.row_blocks;
    const int64_t sequence = block / row_blocks;
    const int64_t first_row = int64_t{block % row_blocks} * tensor.rows_of_block;
    const unsigned vectors = p.half / kWidth, of_row = tensor.parts * vectors;
    for (unsigned i = thread_index(); i < of_row * tensor.rows_of_block; i += kThreads) {
      const unsigned row_in_block = i / of_row, in_row = i - row_in_block * of_row, part = in_row / vectors;
      const int64_t row = first_row + row_in_block;
      if (row < p.rows) rotate(p, tensor, sequence, row, part, (in_row - part * vectors) * kWidth);
    }
  }

 private:
  // Torch computes in the promoted dtype of x and the angles.
  using Values =
      std::conditional_t<sizeof(T) == 2 && std::is_same_v<T, Angle>, PairsOf<T, kWidth>, FloatsOf<kWidth>>;

  // Elements i and half + i of heads.
  static DEVICE void rotate(const Params& p, const Tensor& tensor, int64_t sequence, int64_t row, int part,
                            int i) {
    const Angle* cos = angles(p.cos, sequence, row) + i;
    const Angle* sin = angles(p.sin, sequence, row) + i;
    const Values cos_a(cos), cos_b(cos + p.half);
    // The inverse has the sines of the other half: it is the transpose also where the halves differ.
    Values sin_a(sin + (p.inverse ? p.half : 0)), sin_b(sin + (p.inverse ? 0 : p.half));
    p.inverse ? sin_b.negate() : sin_a.negate();
    const RotaryHeads& heads = tensor.of;
    const int end = static_cast<int>(heads.heads), features = 2 * p.half, step = tensor.parts;
    const T* x =
        static_cast<const T*>(heads.x) + sequence * heads.sequence + row * heads.row + part * heads.head + i;
    const int64_t out = ((sequence * p.rows + row) * heads.heads + part) * features + i;
    with_any_type(p.out_dtype, [&](auto type) {
      auto* y = static_cast<decltype(type)*>(heads.out) + out;
#pragma unroll
      for (int j = 0; j < kHeads; ++j) {
        if (part + j * step >= end) break;
        const Values a(x), b(x + p.half);
        a.turned(cos_a, b, sin_a).write(y);
        b.turned(cos_b, a, sin_b).write(y + p.half);
        x += step * heads.head;
        y += int64_t{step} * features;
      }
    });
  }

  static DEVICE const Angle* angles(const RotaryAngles& angles, int64_t sequence, int64_t row) {
    return static_cast<const Angle*>(angles.of) + sequence * angles.sequence + row * angles.row;
  }
};

}  // namespace peft_kernels::cuda
