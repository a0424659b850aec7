// Adds the deltas of adapters to the sums of an NF4 GEMM.
#pragma once

#include "linear_decode.cuh"

namespace peft_kernels::cuda {

// ---- As a slab ----------------------------------------------------------------------------------------

// sums += v u^T, with the steps of 16 dealt to `turns` warps in turn. The lane has rows row(2r) and row(2r +
// 1) of v in row tile r, and token(i) of u in token tile i.
template <int kRowTiles, int kTokenTiles, class Row, class Token>
DEVICE void multiply_slab(const LinearParams& params, int turn, int turns, const Row& row, const Token& token,
                          float (&sums)[kRowTiles][kTokenTiles][4]) {
  const int t = lane_index() % 4;
  for (int step = turn; step < params.slab.depth / 16; step += turns) {
    const int at = step * 16 + 4 * t;
    const auto words = [&](const void* matrix, int i) {
      const bf16* row = static_cast<const bf16*>(matrix) + int64_t{i} * params.slab.depth;
      return load_constant(reinterpret_cast<const Words2*>(row + at));
    };
    uint32_t b[kTokenTiles][2];
#pragma unroll
    for (int i = 0; i < kTokenTiles; ++i) {
      const Words2 u = words(params.slab.u, token(i));
      b[i][0] = u.v[0];
      b[i][1] = u.v[1];
    }
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      const Words2 low = words(params.slab.v, row(2 * r)), high = words(params.slab.v, row(2 * r + 1));
      const uint32_t a[4] = {low.v[0], high.v[0], low.v[1], high.v[1]};
#pragma unroll
      for (int i = 0; i < kTokenTiles; ++i) mma<bf16>(sums[r][i], a, b[i]);
    }
  }
}

// sums += u v, likewise. The lane has token(i) of u in token tile i, and columns `column` + 2j and + 2j + 1
// of v in feature tile j.
template <int kFeatureTiles, int kTokenTiles, class Token>
DEVICE void multiply_slab_dx(const LinearParams& params, int turn, int turns, int column, const Token& token,
                             float (&sums)[kFeatureTiles][kTokenTiles][4]) {
  for (int at = turn * 16 + 4 * (lane_index() % 4); at < params.slab.depth; at += turns * 16) {
    Words4 v[4];  // rows of it
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      v[i] = load_constant(reinterpret_cast<const Words4*>(static_cast<const bf16*>(params.slab.v) +
                                                           int64_t{at + i} * params.k + column));
    }
    uint32_t b[kTokenTiles][2];
#pragma unroll
    for (int i = 0; i < kTokenTiles; ++i) {
      const auto u = load_constant(reinterpret_cast<const Words2*>(
          static_cast<const bf16*>(params.slab.u) + int64_t{token(i)} * params.slab.depth + at));
      b[i][0] = u.v[0];
      b[i][1] = u.v[1];
    }
#pragma unroll
    for (int j = 0; j < kFeatureTiles; ++j) {
      const uint32_t a[4] = {
          __byte_perm(v[0].v[j], v[1].v[j], 0x5410), __byte_perm(v[0].v[j], v[1].v[j], 0x7632),
          __byte_perm(v[2].v[j], v[3].v[j], 0x5410), __byte_perm(v[2].v[j], v[3].v[j], 0x7632)};
#pragma unroll
      for (int i = 0; i < kTokenTiles; ++i) mma<bf16>(sums[j][i], a, b[i]);
    }
  }
}

// ---- From the adapters themselves ---------------------------------------------------------------------
//
// For adapters of experts, whose slabs would be larger than the factors they are made of. Each fp32 value of
// a factor is split as in a slab (lora_slab.cuh): high + low, bf16 each, of which three products count.

// Two fp32 values, each split into bf16 high and low.
struct SplitPair {
  uint32_t high, low;
};
DEVICE SplitPair split_pair(float a, float b) {
  const uint32_t high = pack2<bf16>(a, b);
  return {high, pack2<bf16>(__fadd_rn(a, -low_half<bf16>(high)), __fadd_rn(b, -high_half<bf16>(high)))};
}

template <class T>
DEVICE float load_factor(const ExpertsDelta& delta, int64_t i) {
  return delta.is_f32 ? load_constant(static_cast<const float*>(delta.factor) + i)
                      : to_float(load_constant(static_cast<const T*>(delta.factor) + i));
}

// Two neighbours, or zeros. Volatile loads, so that they are not hoisted: registers would not suffice.
template <class T>
DEVICE void load_factor_pair(const ExpertsDelta& delta, int64_t i, bool exists, float (&value)[2]) {
  value[0] = value[1] = 0.0f;
  if (!exists) return;
  if (delta.is_f32) {
    const auto pair = load_once(reinterpret_cast<const Words2*>(static_cast<const float*>(delta.factor) + i));
    value[0] = bit_cast<float>(pair.v[0]);
    value[1] = bit_cast<float>(pair.v[1]);
  } else {
    const auto pair = load_once(reinterpret_cast<const uint32_t*>(static_cast<const T*>(delta.factor) + i));
    value[0] = low_half<T>(pair);
    value[1] = high_half<T>(pair);
  }
}

// Four elements of a row of ranks, from `at` on, as the second operand.
DEVICE void split_ranks(const ExpertsDelta& delta, int row, int at, SplitPair (&b)[2]) {
  const float* ranks = delta.ranks + int64_t{row} * delta.rank;
  float value[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    value[i] = at + i < delta.rank ? __fmul_rn(delta.scale, load_constant(ranks + at + i)) : 0.0f;
  }
  b[0] = split_pair(value[0], value[1]);
  b[1] = split_pair(value[2], value[3]);
}

DEVICE void multiply_split(const SplitPair (&a)[4], const SplitPair (&b)[2], float (&sum)[4]) {
  const uint32_t a_high[4] = {a[0].high, a[1].high, a[2].high, a[3].high};
  const uint32_t a_low[4] = {a[0].low, a[1].low, a[2].low, a[3].low};
  mma<bf16>(sum, a_low, {b[0].high, b[1].high});
  mma<bf16>(sum, a_high, {b[0].low, b[1].low});
  mma<bf16>(sum, a_high, {b[0].high, b[1].high});
}

// sums += scale B ranks^T with B [n, rank] of the expert; rows and tokens of the lane as above.
template <class T, int kRowTiles, int kTokenTiles, class Row, class Token>
DEVICE void multiply_delta(const ExpertsDelta& delta, int expert, int n, int turn, int turns, const Row& row,
                           const Token& token, float (&sums)[kRowTiles][kTokenTiles][4]) {
#pragma unroll 1
  for (int step = turn * 16; step < delta.rank; step += turns * 16) {
    const int at = step + 4 * (lane_index() % 4);
    SplitPair a[kRowTiles][4];
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) {
      const int64_t from = (int64_t{expert} * n + row(i)) * delta.rank + at;
      float value[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) value[j] = at + j < delta.rank ? load_factor<T>(delta, from + j) : 0.0f;
      a[i / 2][i % 2] = split_pair(value[0], value[1]);
      a[i / 2][i % 2 + 2] = split_pair(value[2], value[3]);
    }
#pragma unroll
    for (int i = 0; i < kTokenTiles; ++i) {
      SplitPair b[2];
      split_ranks(delta, token(i), at, b);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) multiply_split(a[r], b, sums[r][i]);
    }
  }
}

// sums += scale ranks A with A [rank, k] of the expert, likewise.
template <class T, int kFeatureTiles, int kTokenTiles, class Token>
DEVICE void multiply_delta_dx(const ExpertsDelta& delta, int expert, int k, int turn, int turns, int column,
                              const Token& token, float (&sums)[kFeatureTiles][kTokenTiles][4]) {
#pragma unroll 1
  for (int step = turn * 16; step < delta.rank; step += turns * 16) {
    const int at = step + 4 * (lane_index() % 4);
    SplitPair b[kTokenTiles][2];
#pragma unroll
    for (int i = 0; i < kTokenTiles; ++i) split_ranks(delta, token(i), at, b[i]);
#pragma unroll
    for (int j = 0; j < kFeatureTiles; ++j) {
      float value[4][2];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t from = (int64_t{expert} * delta.rank + at + i) * k + column + 2 * j;
        load_factor_pair<T>(delta, from, at + i < delta.rank, value[i]);
      }
      SplitPair a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a[i] = split_pair(value[i / 2 * 2][i % 2], value[i / 2 * 2 + 1][i % 2]);
      }
#pragma unroll
      for (int i = 0; i < kTokenTiles; ++i) multiply_split(a, b[i], sums[j][i]);
    }
  }
}

}  // namespace peft_kernels::cuda
