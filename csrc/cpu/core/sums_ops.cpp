// Op column_sums: the gradients of biases.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "column_sums.h"
#include "namespace.h"

namespace peft_kernels::cpu {
namespace {

Tensor column_sums_op(const Tensor& x) {
  TORCH_CHECK(x.dim() >= 1, "x: expected at least 1 dimension, got 0");
  return column_sums(as_rows(x, x.size(-1), "x"));
}

}  // namespace

TORCH_LIBRARY_IMPL(PEFT_KERNELS_NAMESPACE, CPU, m) { m.impl("column_sums", column_sums_op); }

}  // namespace peft_kernels::cpu
