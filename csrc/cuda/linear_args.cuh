// What the kernels of products with an NF4 weight share: arguments, the choice of an instance, the sums' last
// terms.
#pragma once

#include "launch.cuh"
#include "linear_output.cuh"
#include "linear_plan.h"
#include "nf4_decode.cuh"

namespace peft_kernels::cuda {

// As in LinearParams.
template <class T>
struct LinearArgs {
  DecodeParams weight;
  const T* x;  // [m, k]; dx: dY [m, n]
  int m;
  int n, k;
  const void* bias;
  DType bias_dtype;
  const T* u;  // [m, depth]
  const T* v;  // [n, depth]; dx: [depth, k]
  int depth;
  T* y;  // [m, n]; dx: [m, k]
};

template <class T>
LinearArgs<T> linear_args(const LinearParams& from) {
  LinearArgs<T> args{};
  args.weight = decode_params<T>(from.weight);
  args.x = static_cast<const T*>(from.x);
  args.m = static_cast<int>(from.m);
  args.n = static_cast<int>(from.n);
  args.k = static_cast<int>(from.k);
  args.bias = from.bias;
  args.bias_dtype = from.bias_dtype;
  args.u = static_cast<const T*>(from.slab.u);
  args.v = static_cast<const T*>(from.slab.v);
  args.depth = static_cast<int>(from.slab.depth);
  args.y = static_cast<T*>(from.y);
  return args;
}

// Calls `body` with a value of the activations' type and one of the table's.
template <class Body>
Status with_operands(DType dtype, bool wide_table, const Body& body) {
  return with_half(
      dtype, [&](auto type) { return wide_table ? body(type, WideTable{}) : body(type, NarrowTable{}); });
}

// Sums of products with codes, which are multiples of a factor, to those of products with weights.
template <class T, int kRowTiles, int kTokenTiles>
DEVICE void take_out_factor(float (&sums)[kRowTiles][kTokenTiles][4]) {
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int i = 0; i < kTokenTiles; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[r][i][e] *= 1.0f / kCodeFactor<T>;
    }
  }
}

// sums += v u^T, `turns` warps taking turns in its steps of 16. The lane's rows of v are row(2r) and
// row(2r + 1) in row tile r, and token(i) of u in token tile i.
template <class T, int kRowTiles, int kTokenTiles, class Row, class Token>
DEVICE void multiply_slab(const LinearArgs<T>& args, int turn, int turns, const Row& row, const Token& token,
                          float (&sums)[kRowTiles][kTokenTiles][4]) {
  const int t = lane_index() % 4;
  for (int step = turn; step < args.depth / 16; step += turns) {
    const int at = step * 16 + 4 * t;
    const auto words = [&](const T* matrix, int i) {
      return load_constant(reinterpret_cast<const Words2*>(matrix + int64_t{i} * args.depth + at));
    };
    uint32_t b[kTokenTiles][2];
#pragma unroll
    for (int i = 0; i < kTokenTiles; ++i) {
      const Words2 u = words(args.u, token(i));
      b[i][0] = u.v[0];
      b[i][1] = u.v[1];
    }
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      const Words2 low = words(args.v, row(2 * r)), high = words(args.v, row(2 * r + 1));
      const uint32_t a[4] = {low.v[0], high.v[0], low.v[1], high.v[1]};
#pragma unroll
      for (int i = 0; i < kTokenTiles; ++i) mma<T>(sums[r][i], a, b[i]);
    }
  }
}

}  // namespace peft_kernels::cuda
