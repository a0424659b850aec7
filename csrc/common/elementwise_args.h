// The arguments of the elementwise ops, checked.
#pragma once

#include <ATen/ATen.h>

#include "activation.h"
#include "checks.h"

namespace peft_kernels {

inline Activation activation_of(c10::string_view name) {
  if (name == "silu") return Activation::kSilu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  TORCH_CHECK(name == "relu", "activation: expected silu, gelu, gelu_tanh or relu, got ", name);
  return Activation::kRelu;
}

// What both directions of gated_activation take.
struct GatedArgs {
  Tensor gate, up;
  DType dtype;  // of all tensors
  Activation activation;

  GatedArgs(const Tensor& gate_in, const Tensor& up_in, c10::string_view name)
      : gate(gate_in.contiguous()),
        up(matching(up_in, gate_in, "up")),
        dtype(dtype_of(gate_in, "gate")),
        activation(activation_of(name)) {}
};

// What both directions of dora_scale take.
struct DoraScaleArgs {
  Tensor z;
  DType dtype;  // of z and its gradients
  int64_t rows, features;
  Tensor scale;  // [features], fp32
  Tensor bias;   // the same, or undefined

  DoraScaleArgs(const Tensor& z_in, const Tensor& scale_in, const OptionalTensor& bias_in) {
    TORCH_CHECK(z_in.dim() >= 1, "z: expected at least 1 dimension, got 0");
    features = z_in.size(-1);
    z = activation(z_in, features, "z");
    dtype = dtype_of(z, "z");
    rows = rows_of(z);
    check_dtype(scale_in, at::kFloat, "scale");
    check_shape(scale_in, {features}, "scale");
    scale = scale_in.contiguous();
    if (bias_in) {
      dtype_of(*bias_in, "bias");
      check_shape(*bias_in, {features}, "bias");
      bias = bias_in->to(at::kFloat).contiguous();
    }
  }
  const float* bias_data() const { return bias.defined() ? bias.const_data_ptr<float>() : nullptr; }
};

}  // namespace peft_kernels
