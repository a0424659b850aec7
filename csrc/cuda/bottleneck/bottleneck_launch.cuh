// Shared by the launches of bottleneck kernels.
#pragma once

#include "bottleneck.cuh"
#include "bottleneck.h"

namespace peft_kernels::cuda {

using AnyBottleneck = BottleneckRows<bf16, true, false>;

inline BottleneckStep step_of(const BottleneckView& view) {
  return {view.rank, view.activation, view.mask, view.down_bias};
}

// Only backward's results may be null. Backward only reads z.
inline BottleneckMatrices matrices_of(const float* z, float* value, float* dz) {
  return {const_cast<float*>(z), value, dz, are_aligned({z, value, dz})};
}

// An adapter's factors as one direction uses them.
template <bool kBackward>
BottleneckAdapter adapter_of(const BottleneckView& view) {
  const bool down_is_f32 = view.down_dtype == DType::kF32, up_is_f32 = view.up_dtype == DType::kF32;
  BottleneckAdapter a{};
  a.step = step_of(view);
  if (kBackward) {
    a.in_factor = view.up;
    a.in_is_f32 = up_is_f32;
    a.out_factor = {view.down, view.k, 1, down_is_f32};
  } else {
    a.in_factor = view.down;
    a.in_is_f32 = down_is_f32;
    a.out_factor = {view.up, 1, view.rank, up_is_f32};
    a.bias = view.up_bias;
  }
  a.in_scale = kBackward ? view.scaling : 1.0f;
  a.out_scale = kBackward ? 1.0f : view.scaling;
  const int tiles = static_cast<int>(ceil_div(view.rank, kTileRanks));
  a.groups = 1;
  while (a.groups * AnyBottleneck::kTiles < tiles) a.groups *= 2;
  a.tiles = static_cast<int>(ceil_div(tiles, a.groups));
  a.ld = a.groups * a.tiles * kTileRanks + 4;
  return a;
}

// Whether its factors can be read in vectors.
template <bool kBackward>
bool has_aligned_factors(const BottleneckAdapter& a) {
  return are_aligned({kBackward ? a.out_factor.data : a.in_factor, a.bias});
}

inline int shared_bytes(const BottleneckAdapter& a) {
  const int slices = AnyBottleneck::kWarps / AnyBottleneck::kRowWarps / a.groups;
  return slices * AnyBottleneck::kRows * a.ld * static_cast<int>(sizeof(float));
}

// Calls `body` with a value of the activations' type, and true or false: with_kernel(dtype, vectors,
// [&](auto type, auto vector) { .. Kernel<decltype(type), decltype(vector)::value> .. }).
template <class Body>
void with_kernel(DType dtype, bool vectors, const Body& body) {
  with_half(dtype,
            [&](auto type) { vectors ? body(type, std::true_type{}) : body(type, std::false_type{}); });
}

}  // namespace peft_kernels::cuda
