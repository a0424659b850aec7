// Checked arguments of RMS norms.
#pragma once

#include <ATen/ATen.h>

#include "checks.h"

namespace peft_kernels {

// The arguments common to both directions.
struct RmsNormArgs {
  Tensor x;       // [m, features]
  Tensor weight;  // [features]
  int64_t m, features;
  DType dtype;  // of x

  RmsNormArgs(const Tensor& x_in, const Tensor& weight_in) : weight(weight_in.contiguous()) {
    dtype_of(weight, "weight");
    TORCH_CHECK(weight.dim() == 1 && weight.numel() > 0, "weight: expected shape (features,), got ",
                weight.sizes());
    features = weight.numel();
    x = as_rows(x_in, features, "x");
    m = x.size(0);
    dtype = dtype_of(x, "x");
  }

  // The dtype of the result, or of its gradient.
  DType result_dtype(const Tensor& y, const char* name) const {
    const DType result = dtype_of(y, name);
    TORCH_CHECK(dtype == DType::kF32 || result == DType::kF32 || result == dtype, name,
                ": expected Float or ", x.scalar_type(), " like x, got ", y.scalar_type());
    return result;
  }
};

// Of the forward, for a tensor `like` x: y and rstd, uninitialised.
struct RmsNormResults {
  Tensor y, rstd;
  DType dtype;  // of y

  RmsNormResults(const RmsNormArgs& args, const Tensor& like, at::ScalarType type)
      : y(at::empty(like.sizes(), like.options().dtype(type))),
        rstd(at::empty(like.sizes().slice(0, like.dim() - 1), like.options().dtype(at::kFloat))),
        dtype(args.result_dtype(y, "dtype")) {}
};

// Of the backward, in the shape of x as it was given.
struct RmsNormGradientArgs : RmsNormArgs {
  Tensor dy, rstd;
  Tensor add;  // or undefined
  DType dy_dtype;

  RmsNormGradientArgs(const Tensor& dy_in, const Tensor& x_in, const Tensor& weight_in, const Tensor& rstd_in,
                      const OptionalTensor& add_in)
      : RmsNormArgs(x_in, weight_in), dy_dtype(result_dtype(dy_in, "dy")) {
    check_shape(dy_in, x_in.sizes(), "dy");
    check_dtype(rstd_in, at::kFloat, "rstd");
    check_shape(rstd_in, x_in.sizes().slice(0, x_in.dim() - 1), "rstd");
    dy = dy_in.contiguous();
    rstd = rstd_in.contiguous();
    if (add_in) add = matching(*add_in, x_in, "add");
  }
};

}  // namespace peft_kernels
