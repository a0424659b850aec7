// Launches the bottleneck kernels: both GEMMs in one, or the step between them.
#include "../core/launch.cuh"
#include "bottleneck.cuh"
#include "bottleneck.h"

namespace peft_kernels::cuda {
namespace {

using Any = BottleneckRows<bf16, true, false>;

BottleneckMiddle middle_of(const BottleneckView& view, const float* bias, const float* z, float* value,
                           float* dz) {
  return {view.m * view.rank,
          view.rank,
          view.activation,
          view.mask,
          bias,
          const_cast<float*>(z),  // backward only reads it
          value,
          dz,
          are_aligned({z, value, dz})};
}

int64_t blocks_of(const BottleneckView& view) { return ceil_div(view.m, Any::kRows); }

// One pass: in [m, in_features] times in_factor gives the ranks, and these times out_factor out_features.
struct Pass {
  const void* in;
  int64_t in_features, out_features;
  const void* in_factor;
  DType in_dtype;
  float in_scale;
  const void* term;
  RankFactor out_factor;
  const float* bias;
  float out_scale;
  void* out;
};

template <class T, bool kVector, bool kBackward>
void run(const BottleneckView& view, const Pass& pass, const BottleneckMiddle& middle, Stream stream) {
  using Kernel = BottleneckRows<T, kVector, kBackward>;
  typename Kernel::Params params{};
  params.in = static_cast<const T*>(pass.in);
  params.m = view.m;
  params.in_features = pass.in_features;
  params.out_features = pass.out_features;
  params.in_factor = pass.in_factor;
  params.in_is_f32 = pass.in_dtype == DType::kF32;
  params.in_scale = pass.in_scale;
  params.middle = middle;
  const int tiles = static_cast<int>(ceil_div(view.rank, kTileRanks));
  params.groups = 1;
  while (params.groups * Kernel::kTiles < tiles) params.groups *= 2;
  params.tiles = static_cast<int>(ceil_div(tiles, params.groups));
  params.ld = params.groups * params.tiles * kTileRanks + 4;
  params.term = static_cast<const T*>(pass.term);
  params.out_factor = pass.out_factor;
  params.bias = pass.bias;
  params.out_scale = pass.out_scale;
  params.out = static_cast<T*>(pass.out);
  const int slices = Kernel::kWarps / Kernel::kRowWarps / params.groups;
  launch<Kernel>(params, blocks_of(view), stream,
                 slices * Kernel::kRows * params.ld * static_cast<int>(sizeof(float)));
}

template <bool kBackward>
void run(const BottleneckView& view, const Pass& pass, const BottleneckMiddle& middle, Stream stream) {
  bool vectors = has_vectors(pass.in, pass.in_features) && has_vectors(pass.out, pass.out_features) &&
                 are_aligned({pass.term, pass.bias});
  vectors = vectors && are_aligned({kBackward ? pass.out_factor.data : pass.in_factor});
  with_half(view.dtype, [&](auto type) {
    using T = decltype(type);
    vectors ? run<T, true, kBackward>(view, pass, middle, stream)
            : run<T, false, kBackward>(view, pass, middle, stream);
  });
}

template <bool kBackward>
void between(const BottleneckMiddle& middle, Stream stream) {
  using Kernel = BottleneckBetween<kBackward>;
  launch<Kernel>(middle, ceil_div(middle.count, 4 * Kernel::kThreads), stream);
}

}  // namespace

bool is_fused(const BottleneckView& view, const Card& card) {
  return view.rank <= Any::kMostRanks && blocks_of(view) >= card.sms;
}

void bottleneck(const BottleneckView& view, const void* x, const void* residual, const float* down_bias,
                const float* up_bias, float* z, void* y, Stream stream) {
  const RankFactor up{view.up, 1, view.rank, view.up_dtype == DType::kF32};
  const Pass pass{x,  view.k,  view.n,       view.down, view.down_dtype, 1.0f, residual,
                  up, up_bias, view.scaling, y};
  run<false>(view, pass, middle_of(view, down_bias, z, nullptr, nullptr), stream);
}

void bottleneck_backward(const BottleneckView& view, const void* dy, const float* z, const void* term,
                         float* value, float* dz, void* dx, Stream stream) {
  const RankFactor down{view.down, view.k, 1, view.down_dtype == DType::kF32};
  const Pass pass{dy, view.n, view.k, view.up, view.up_dtype, view.scaling, term, down, nullptr, 1.0f, dx};
  run<true>(view, pass, middle_of(view, nullptr, z, value, dz), stream);
}

void bottleneck_between(const BottleneckView& view, const float* down_bias, float* z, float* value,
                        Stream stream) {
  between<false>(middle_of(view, down_bias, z, value, nullptr), stream);
}

void bottleneck_between_backward(const BottleneckView& view, const float* z, float* value, float* dz,
                                 Stream stream) {
  between<true>(middle_of(view, nullptr, z, value, dz), stream);
}

}  // namespace peft_kernels::cuda
