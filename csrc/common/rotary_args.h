// Checked arguments of rotary embeddings.
#pragma once

#include <ATen/ATen.h>

#include <vector>

#include "checks.h"

namespace peft_kernels {

// The tensor, copied if its elements of the last dimension are not adjacent.
inline Tensor contiguous_in_last(const Tensor& t) {
  return t.stride(-1) == 1 || t.size(-1) <= 1 ? t : t.contiguous();
}

struct RotaryArgs {
  std::vector<Tensor> x;  // [sequences, rows, heads, features], contiguous in features
  DType dtype;            // of all of them
  Tensor cos, sin;        // [sequences or 1, rows, features], of one dtype
  int64_t sequences = 0, rows, features;

  RotaryArgs(at::TensorList x_in, const Tensor& cos_in, const Tensor& sin_in) : cos(cos_in), sin(sin_in) {
    dtype_of(cos, "cos");
    TORCH_CHECK(cos.dim() == 3, "cos: expected shape (batch or 1, rows, features), got ", cos.sizes());
    TORCH_CHECK(cos.size(2) % 2 == 0, "cos: expected an even number of features, got ", cos.size(2));
    check_dtype(sin, cos.scalar_type(), "sin");
    check_shape(sin, cos.sizes(), "sin");
    rows = cos.size(1);
    features = cos.size(2);
    for (const Tensor& one : x_in) {
      dtype = dtype_of(one, "x");
      TORCH_CHECK(one.dim() == 4 && one.size(1) == rows && one.size(3) == features &&
                      (cos.size(0) == 1 || cos.size(0) == one.size(0)),
                  "x: expected shape (", cos.size(0), " or any, ", rows, ", heads, ", features, "), got ",
                  one.sizes());
      check_dtype(one, x_in[0].scalar_type(), "x");
      sequences = x_in[0].size(0);
      TORCH_CHECK(one.size(0) == sequences, "x: expected ", sequences, " sequences, got ", one.size(0));
      x.push_back(contiguous_in_last(one));
    }
  }

  // Whether products and sums are rounded to x's dtype: torch computes in the promoted dtype of x and cos.
  bool rounds() const { return dtype != DType::kF32 && x[0].scalar_type() == cos.scalar_type(); }
};

}  // namespace peft_kernels
