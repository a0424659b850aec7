// dora_norm: the norms of the rows of W + s B A, expanded so that the product B A is never formed:
// ||w + s b A||^2 = w . w + s (2 w A^T + s b A A^T) . b.
#pragma once

#include <ATen/ATen.h>

#include "checks.h"

namespace peft_kernels {

struct DoraNormArgs {
  Tensor a;  // [r, in_features], fp32
  Tensor b;  // [out_features, r], fp32
  double scaling;

  DoraNormArgs(const Tensor& lora_a, const Tensor& lora_b, double scaling) : scaling(scaling) {
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

  // The norms, of w . w by row and W A^T [out_features, r].
  Tensor norm(const Tensor& squares, const Tensor& wa) const {
    const Tensor sums = at::addmm(wa, b, at::mm(a, a.t()), 2, scaling);
    return sums.mul(b).sum(1).mul_(scaling).add_(squares).clamp_min_(0).sqrt_();
  }
};

}  // namespace peft_kernels
