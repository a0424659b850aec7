// The elementwise ops: tensors to pointers, and registration. Schemas live in peft_kernels/spec.py.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <tuple>

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

Activation activation_of(c10::string_view name) {
  if (name == "silu") return Activation::kSilu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  TORCH_CHECK(name == "relu", "activation: expected silu, gelu, gelu_tanh or relu, got ", name);
  return Activation::kRelu;
}

// An element costs an exponential and a division: a few times what a copy costs.
constexpr int64_t kGatedGrain = kElementwiseGrain / 4;

Tensor gated_activation(const Tensor& gate, const Tensor& up, c10::string_view activation) {
  const Tensor g = gate.contiguous(), u = matching(up, gate, "up");
  Tensor out = at::empty(g.sizes(), g.options());
  GatedParams params{};
  params.gate = g.const_data_ptr();
  params.up = u.const_data_ptr();
  params.dtype = dtype_of(g, "gate");
  params.activation = activation_of(activation);
  params.out = out.mutable_data_ptr();
  const auto gated = kernels().gated;
  parallel_for(0, g.numel(), kGatedGrain, [&](int64_t begin, int64_t end) { gated(params, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor> gated_activation_backward(const Tensor& dy, const Tensor& gate, const Tensor& up,
                                                     c10::string_view activation) {
  const Tensor g = gate.contiguous(), u = matching(up, gate, "up"), d = matching(dy, gate, "dy");
  Tensor d_gate = at::empty(g.sizes(), g.options()), d_up = at::empty(g.sizes(), g.options());
  GatedParams params{};
  params.gate = g.const_data_ptr();
  params.up = u.const_data_ptr();
  params.dy = d.const_data_ptr();
  params.dtype = dtype_of(g, "gate");
  params.activation = activation_of(activation);
  params.d_gate = d_gate.mutable_data_ptr();
  params.d_up = d_up.mutable_data_ptr();
  const auto gated_backward = kernels().gated_backward;
  parallel_for(0, g.numel(), kGatedGrain,
               [&](int64_t begin, int64_t end) { gated_backward(params, begin, end); });
  return {d_gate, d_up};
}

Tensor feature_scale(const Tensor& scale, int64_t features) {
  check_dtype(scale, at::kFloat, "scale");
  check_shape(scale, {features}, "scale");
  return scale.contiguous();
}

// What both directions take; holds the tensors that the pointers point into.
struct Scaling {
  Tensor z, scale, bias;
  ScaleParams params{};

  Scaling(const Tensor& z_in, const Tensor& scale_in, const OptionalTensor& bias_in) {
    TORCH_CHECK(z_in.dim() >= 1, "z: expected at least 1 dimension, got 0");
    const int64_t features = z_in.size(-1);
    z = activation(z_in, features, "z");
    scale = feature_scale(scale_in, features);
    if (bias_in) {
      dtype_of(*bias_in, "bias");
      check_shape(*bias_in, {features}, "bias");
      bias = bias_in->to(at::kFloat).contiguous();
      params.bias = bias.const_data_ptr<float>();
    }
    params.z = z.const_data_ptr();
    params.dtype = dtype_of(z, "z");
    params.scale = scale.const_data_ptr<float>();
    params.m = rows_of(z);
    params.n = features;
  }
};

Tensor dora_scale(const Tensor& z, const Tensor& scale, const OptionalTensor& bias) {
  Scaling scaling(z, scale, bias);
  Tensor y = at::empty(z.sizes(), z.options());
  ScaleParams& params = scaling.params;
  params.y = y.mutable_data_ptr();
  const auto scale_features = kernels().scale_features;
  parallel_for(0, params.m, ceil_div(kElementwiseGrain, std::max<int64_t>(params.n, 1)),
               [&](int64_t begin, int64_t end) { scale_features(params, begin, end); });
  return y;
}

std::tuple<Tensor, Tensor> dora_scale_backward(const Tensor& dy, const Tensor& z, const Tensor& scale,
                                               const OptionalTensor& bias) {
  Scaling scaling(z, scale, bias);
  const Tensor d = matching(dy, z, "dy");
  Tensor dz = at::empty(z.sizes(), z.options()), d_scale = at::empty_like(scaling.scale);
  ScaleParams& params = scaling.params;
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
