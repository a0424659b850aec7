// Op dropout.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "../core/namespace.h"
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

}  // namespace

TORCH_LIBRARY_IMPL(PEFT_KERNELS_NAMESPACE, CPU, m) { m.impl("dropout", dropout); }

}  // namespace peft_kernels::cpu
