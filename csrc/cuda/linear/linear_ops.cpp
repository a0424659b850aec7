// The ops of GEMMs with an NF4 weight: tensors to pointers, and registration. Schemas are in
// peft_kernels/ops/.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "../core/runtime.h"
#include "linear_gemm.h"

namespace peft_kernels::cuda {
namespace {

BaseWeight nf4_base(const Tensor& packed, const Tensor& absmax, const OptionalTensor& absmax2,
                    const OptionalTensor& offset, int64_t layout, int64_t out_features, int64_t in_features,
                    const Tensor& x) {
  return {packed, absmax, absmax2, offset, layout, out_features, in_features, x.scalar_type()};
}

Tensor nf4_linear_op(const Tensor& x, const Tensor& packed, const Tensor& absmax,
                     const OptionalTensor& absmax2, const OptionalTensor& offset, int64_t layout,
                     int64_t out_features, const OptionalTensor& bias) {
  const OnDeviceOf device(x, "x");
  TORCH_CHECK(x.dim() >= 1, "x: expected at least 1 dimension, got 0");
  TORCH_CHECK(out_features >= 0, "out_features: expected 0 or more, got ", out_features);
  const int64_t in_features = x.size(-1);
  const Tensor rows = as_rows(x, in_features, "x");
  const BaseWeight base = nf4_base(packed, absmax, absmax2, offset, layout, out_features, in_features, x);
  return reshaped(BaseGemm::forward(rows, base).run(bias), sizes_with_last(x, out_features));
}

Tensor nf4_linear_dx_op(const Tensor& dy, const Tensor& packed, const Tensor& absmax,
                        const OptionalTensor& absmax2, const OptionalTensor& offset, int64_t layout,
                        int64_t in_features) {
  const OnDeviceOf device(dy, "dy");
  TORCH_CHECK(dy.dim() >= 1, "dy: expected at least 1 dimension, got 0");
  TORCH_CHECK(in_features >= 0, "in_features: expected 0 or more, got ", in_features);
  const int64_t out_features = dy.size(-1);
  const Tensor rows = as_rows(dy, out_features, "dy");
  const BaseWeight base = nf4_base(packed, absmax, absmax2, offset, layout, out_features, in_features, dy);
  return reshaped(BaseGemm::backward(rows, base).run(), sizes_with_last(dy, in_features));
}

}  // namespace

TORCH_LIBRARY_IMPL(PEFT_KERNELS_NAMESPACE, PEFT_KERNELS_DISPATCH_KEY, m) {
  m.impl("nf4_linear", nf4_linear_op);
  m.impl("nf4_linear_dx", nf4_linear_dx_op);
}

}  // namespace peft_kernels::cuda
