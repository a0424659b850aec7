// Launches RmsNormBackward and RmsNormBackwardLoop, and the sum of the weight's gradients of their blocks.
#include "norm_launch.cuh"
#include "rms_norm_backward.cuh"

namespace peft_kernels::cuda {
namespace {

template <class Kernel, bool kDweight>
void start(const RmsNormGradient& params, Context& context) {
  const int64_t features = params.rows.features, blocks = row_blocks<Kernel>(params.rows.m, context.card);
  float* partial = nullptr;
  if (kDweight) partial = static_cast<float*>(context.workspace(blocks * features * int64_t{sizeof(float)}));
  launch<Kernel>({params, partial}, blocks, context.stream, sizeof(typename Kernel::Shared));
  if (!kDweight) return;
  with_type(params.rows.weight_dtype, [&](auto type) {
    using Sum = SumParts<decltype(type)>;
    launch<Sum>({partial, blocks, features, static_cast<decltype(type)*>(params.dweight)},
                ceil_div(features, kWarp), context.stream, sizeof(typename Sum::Shared));
  });
}

template <class T, bool kDweight>
struct Start {
  const RmsNormGradient& params;
  Context& context;

  template <int kRowThreads, int kElements>
  void operator()(RowLayout<kRowThreads, kElements>) const {
    start<RmsNormBackward<T, kDweight, kRowThreads, kElements>, kDweight>(params, context);
  }
  void operator()(LoopOverVectors) const {
    start<RmsNormBackwardLoop<T, kDweight, 16 / sizeof(T)>, kDweight>(params, context);
  }
  void operator()(LoopOverElements) const {
    start<RmsNormBackwardLoop<T, kDweight, 1>, kDweight>(params, context);
  }
};

}  // namespace

void rms_norm_backward(const RmsNormGradient& params, Context& context) {
  with_type(params.rows.dtype, [&](auto type) {
    using T = decltype(type);
    params.dweight ? with_row_layout<T>(params.rows.features, Start<T, true>{params, context})
                   : with_row_layout<T>(params.rows.features, Start<T, false>{params, context});
  });
}

}  // namespace peft_kernels::cuda
