// Ops nf4_linear and nf4_linear_dx.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "../core/namespace.h"
#include "linear_gemm.h"

namespace peft_kernels::cpu {
namespace {

Tensor nf4_linear(const Tensor& x, const Tensor& packed, const Tensor& absmax, const OptionalTensor& absmax2,
                  const OptionalTensor& offset, int64_t layout, int64_t out_features,
                  const OptionalTensor& bias) {
  TORCH_CHECK(x.dim() >= 1, "x: expected at least 1 dimension, got 0");
  TORCH_CHECK(out_features >= 0, "out_features: expected 0 or more, got ", out_features);
  const int64_t in_features = x.size(-1);
  const Rows rows(activation(x, in_features, "x"));
  const Nf4Weight weight(packed, absmax, absmax2, offset, layout, out_features, in_features);
  Tensor y = at::empty(sizes_with_last(x, out_features), x.options());
  Gemm gemm(y);
  gemm.set_bias(bias, x.scalar_type());
  gemm.add(term_of(rows.tensor(), "x", weight.matrix(in_features)));
  gemm.run_nt(rows);
  return y;
}

Tensor nf4_linear_dx(const Tensor& dy, const Tensor& packed, const Tensor& absmax,
                     const OptionalTensor& absmax2, const OptionalTensor& offset, int64_t layout,
                     int64_t in_features) {
  TORCH_CHECK(dy.dim() >= 1, "dy: expected at least 1 dimension, got 0");
  TORCH_CHECK(in_features >= 0, "in_features: expected 0 or more, got ", in_features);
  const int64_t out_features = dy.size(-1);
  const Tensor rows = activation(dy, out_features, "dy");
  const Nf4Weight weight(packed, absmax, absmax2, offset, layout, out_features, in_features);
  Tensor dx = at::empty(sizes_with_last(dy, in_features), dy.options());
  Gemm gemm(dx);
  gemm.add(term_of(rows, "dy", weight.matrix(in_features)));
  gemm.run_nn();
  return dx;
}

}  // namespace

TORCH_LIBRARY_IMPL(PEFT_KERNELS_NAMESPACE, CPU, m) {
  m.impl("nf4_linear", nf4_linear);
  m.impl("nf4_linear_dx", nf4_linear_dx);
}

}  // namespace peft_kernels::cpu
