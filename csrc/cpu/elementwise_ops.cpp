// The elementwise ops: tensors to pointers, and registration. Schemas live in peft_kernels/spec.py.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <tuple>

#include "../common/dora_args.h"
#include "../common/gated_args.h"
#include "dropout.h"

namespace peft_kernels::cpu {
namespace {

Tensor dropout(const Tensor& x, double p, const Tensor& seed) {
  dtype_of(x, "x");
  const Tensor in = x.contiguous();
  Tensor out = at::empty(in.sizes(), in.options());
  run_dropout(in, mask_of(dropout_of(p, seed, 0), seed, 0), out);
  return out;
}

// An element costs an exponential and a division: a few times what a copy costs.
constexpr int64_t kGatedGrain = kElementwiseGrain / 4;

GatedParams params_of(const GatedArgs& args) {
  GatedParams params{};
  params.gate = args.gate.const_data_ptr();
  params.up = args.up.const_data_ptr();
  params.dtype = args.dtype;
  params.activation = args.activation;
  return params;
}

Tensor gated_activation(const Tensor& gate, const Tensor& up, c10::string_view activation) {
  const GatedArgs args(gate, up, activation);
  Tensor out = at::empty(args.gate.sizes(), args.gate.options());
  GatedParams params = params_of(args);
  params.out = out.mutable_data_ptr();
  const auto gated = kernels().gated;
  parallel_for(0, out.numel(), kGatedGrain, [&](int64_t begin, int64_t end) { gated(params, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor> gated_activation_backward(const Tensor& dy, const Tensor& gate, const Tensor& up,
                                                     c10::string_view activation) {
  const GatedArgs args(gate, up, activation);
  const Tensor d = matching(dy, gate, "dy");
  Tensor d_gate = at::empty(d.sizes(), d.options()), d_up = at::empty(d.sizes(), d.options());
  GatedParams params = params_of(args);
  params.dy = d.const_data_ptr();
  params.d_gate = d_gate.mutable_data_ptr();
  params.d_up = d_up.mutable_data_ptr();
  const auto gated_backward = kernels().gated_backward;
  parallel_for(0, d.numel(), kGatedGrain,
               [&](int64_t begin, int64_t end) { gated_backward(params, begin, end); });
  return {d_gate, d_up};
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
  constexpr int64_t kStrip = 64;  // columns that no task splits
  parallel_for(0, ceil_div(params.n, kStrip),
               ceil_div(kElementwiseGrain, std::max<int64_t>(params.m, 1) * kStrip),
               [&](int64_t begin, int64_t end) {
                 backward(params, begin * kStrip, std::min(end * kStrip, params.n));
               });
  return {dz, d_scale};
}

}  // namespace

TORCH_LIBRARY_IMPL(peft_kernels_cpu, CPU, m) {
  m.impl("dropout", dropout);
  m.impl("gated_activation", gated_activation);
  m.impl("gated_activation_backward", gated_activation_backward);
  m.impl("dora_scale", dora_scale);
  m.impl("dora_scale_backward", dora_scale_backward);
}

}  // namespace peft_kernels::cpu
