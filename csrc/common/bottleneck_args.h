// Checked arguments of bottleneck adapters.
#pragma once

#include <ATen/ATen.h>

#include "gated_args.h"
#include "lora_args.h"

namespace peft_kernels {

// The arguments common to both directions.
struct BottleneckArgs {
  Tensor x;  // [m, k]
  OptionalTensor norm_weight;
  Tensor down;  // [r, k]
  Tensor up;    // [n, r]
  Activation activation;
  float scaling;
  Dropout dropout;  // of [m, r]
  int64_t m, k, r, n;

  BottleneckArgs(const Tensor& x_in, const OptionalTensor& norm_weight_in, const OptionalTensor& norm_bias,
                 const Tensor& down_in, const Tensor& up_in, c10::string_view activation_name, double scale,
                 double dropout_p, const OptionalTensor& seed)
      : norm_weight(norm_weight_in),
        activation(activation_of(activation_name)),
        scaling(static_cast<float>(scale)),
        dropout(dropout_of(dropout_p, seed, 0)) {
    TORCH_CHECK(down_in.dim() == 2, "down: expected 2 dimensions, got ", down_in.dim());
    TORCH_CHECK(up_in.dim() == 2, "up: expected 2 dimensions, got ", up_in.dim());
    r = down_in.size(0);
    k = down_in.size(1);
    n = up_in.size(0);
    TORCH_CHECK(r > 0 && k > 0, "down: expected elements, got ", down_in.sizes());
    check_shape(up_in, {n, r}, "up");
    x = as_rows(x_in, k, "x");
    m = x.size(0);
    down = parameter(down_in, "down");
    up = parameter(up_in, "up");
    checked_vector(norm_weight, k, "norm_weight");
    checked_vector(norm_bias, k, "norm_bias");
    TORCH_CHECK(norm_weight || !norm_bias, "norm_bias: expected a norm_weight too");
  }

  at::TensorOptions floats() const { return x.options().dtype(at::kFloat); }

  // A small parameter in fp32; undefined if there is none.
  Tensor fp32_vector(const OptionalTensor& t, int64_t size, const char* name) const {
    const Tensor checked = checked_vector(t, size, name);
    return checked.defined() ? checked.to(at::kFloat) : checked;
  }
  // The same in its own dtype.
  Tensor checked_vector(const OptionalTensor& t, int64_t size, const char* name) const {
    if (!t) return {};
    check_shape(*t, {size}, name);
    return parameter(*t, name);
  }

  void check_residual_shape() const {
    TORCH_CHECK(n == k, "up: expected ", k, " rows like x has features, got ", n);
  }

 private:
  Tensor parameter(const Tensor& t, const char* name) const {
    parameter_dtype(t, x.scalar_type(), name);
    return t.contiguous();
  }
};

// The further arguments of backward.
struct BottleneckGradient {
  Tensor dy;  // [m, n]
  Tensor z;   // [m, r], the bottleneck before its activation

  // `x` with its leading sizes; `adds_dy`: forward added x to its output.
  BottleneckGradient(const BottleneckArgs& args, const Tensor& x, const Tensor& dy_in, const Tensor& z_in,
                     bool adds_dy) {
    check_dtype(dy_in, x.scalar_type(), "dy");
    check_shape(dy_in, sizes_with_last(x, args.n), "dy");
    check_dtype(z_in, at::kFloat, "z");
    check_shape(z_in, sizes_with_last(x, args.r), "z");
    if (adds_dy) args.check_residual_shape();
    dy = as_rows(dy_in, args.n, "dy");
    z = as_rows(z_in, args.r, "z");
  }
};

}  // namespace peft_kernels
