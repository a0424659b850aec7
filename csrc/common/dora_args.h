// Checked arguments of the DoRA ops.
#pragma once

#include <ATen/ATen.h>

#include "checks.h"

namespace peft_kernels {

// The arguments common to both directions of dora_scale.
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

// The adapter of dora_norm.
struct DoraNormArgs {
  Tensor a;  // [r, in_features], fp32
  Tensor b;  // [out_features, r], fp32

  DoraNormArgs(const Tensor& lora_a, const Tensor& lora_b) {
    TORCH_CHECK(lora_a.dim() == 2 && lora_b.dim() == 2, "lora_a, lora_b: expected 2 dimensions, got ",
                lora_a.dim(), ", ", lora_b.dim());
    check_shape(lora_b, {lora_b.size(0), lora_a.size(0)}, "lora_b");
    dtype_of(lora_a, "lora_a");
    dtype_of(lora_b, "lora_b");
    a = lora_a.to(at::kFloat).contiguous();
    b = lora_b.to(at::kFloat);
  }
  int64_t out_features() const { return b.size(0); }
  int64_t in_features() const { return a.size(1); }
};

}  // namespace peft_kernels
