// Ops dora_norm, dora_scale and dora_scale_backward.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <tuple>

#include "../../common/autocast.h"
#include "../../common/dora_args.h"
#include "../core/namespace.h"
#include "../linear/linear_gemm.h"

namespace peft_kernels::cpu {
namespace {

//|w + s b A||^2 = w . w + s (2 w A^T + s b A A^T) . b, row by row, so B A is never formed.
Tensor dora_norm(const Tensor& weight, const OptionalTensor& absmax, const OptionalTensor& absmax2,
                 const OptionalTensor& offset, int64_t layout, const Tensor& lora_a, const Tensor& lora_b,
                 double scaling) {
  const WithoutAutocast without_autocast;
  const DoraNormArgs args(lora_a, lora_b);
  const int64_t out_features = args.out_features(), in_features = args.in_features();
  const BaseWeight base(absmax ? weight : weight.contiguous(), absmax, absmax2, offset, layout, out_features,
                        in_features, weight.scalar_type());
  const MatrixView w = base.matrix();

  Tensor squares = at::empty({out_features}, args.a.options());
  float* out = squares.mutable_data_ptr<float>();
  const auto row_squares = kernels().row_squares;
  constexpr int64_t kElementsPerThread = 65536;
  parallel_for(0, out_features, ceil_div(kElementsPerThread, std::max<int64_t>(in_features, 1)),
               [&](int64_t begin, int64_t end) { row_squares(w, in_features, begin, end, out); });

  Tensor aw = at::empty({args.a.size(0), out_features}, args.a.options());  // [r, out_features]
  Gemm gemm(aw);
  gemm.add(term_of(args.a, "lora_a", w));
  gemm.run_nt();
  const Tensor dots = at::addmm(aw.t(), args.b, at::mm(args.a, args.a.t()), 2, scaling).mul_(args.b).sum(1);
  return squares.add_(dots, scaling).clamp_min_(0).sqrt_();
}

ScaleParams params_of(const DoraScaleArgs& args) {
  ScaleParams params{};
  params.z = args.z.const_data_ptr();
  params.dtype = args.dtype;
  params.scale = args.scale.const_data_ptr<float>();
  params.bias = args.bias_data();
  params.m = args.rows;
  params.n = args.features;
  return params;
}

Tensor dora_scale(const Tensor& z, const Tensor& scale, const OptionalTensor& bias) {
  const DoraScaleArgs args(z, scale, bias);
  Tensor y = at::empty(z.sizes(), z.options());
  ScaleParams params = params_of(args);
  params.y = y.mutable_data_ptr();
  const auto scale_features = kernels().scale_features;
  parallel_for(0, params.m, ceil_div(kElementwiseGrain, std::max<int64_t>(params.n, 1)),
               [&](int64_t begin, int64_t end) { scale_features(params, begin, end); });
  return y;
}

std::tuple<Tensor, Tensor> dora_scale_backward(const Tensor& dy, const Tensor& z, const Tensor& scale,
                                               const OptionalTensor& bias) {
  const DoraScaleArgs args(z, scale, bias);
  const Tensor d = matching(dy, z, "dy");
  Tensor dz = at::empty(z.sizes(), z.options()), d_scale = at::empty_like(args.scale);
  ScaleParams params = params_of(args);
  params.dy = d.const_data_ptr();
  params.dz = dz.mutable_data_ptr();
  params.d_scale = d_scale.mutable_data_ptr<float>();
  const auto backward = kernels().scale_features_backward;
  constexpr int64_t kStrip = 64;  // columns that tasks do not split
  parallel_for(0, ceil_div(params.n, kStrip),
               ceil_div(kElementwiseGrain, std::max<int64_t>(params.m, 1) * kStrip),
               [&](int64_t begin, int64_t end) {
                 backward(params, begin * kStrip, std::min(end * kStrip, params.n));
               });
  return {dz, d_scale};
}

}  // namespace

TORCH_LIBRARY_IMPL(PEFT_KERNELS_NAMESPACE, CPU, m) {
  m.impl("dora_norm", dora_norm);
  m.impl("dora_scale", dora_scale);
  m.impl("dora_scale_backward", dora_scale_backward);
}

}  // namespace peft_kernels::cpu
