// The op of dropout: tensors to pointers, and registration. Schemas live in peft_kernels/ops/.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "../../common/lora_args.h"
#include "../core/runtime.h"
#include "dropout.h"

namespace peft_kernels::cuda {
namespace {

Tensor dropout_op(const Tensor& x, double p, const Tensor& seed) {
  const OnDeviceOf device(x, "x");
  const DType dtype = dtype_of(x, "x");
  const Dropout args = dropout_of(p, seed, 0);
  if (args.threshold == 0) return x.clone(at::MemoryFormat::Contiguous);
  const Tensor in = x.contiguous();
  Tensor out = at::empty(in.sizes(), in.options());
  const DropoutMask mask{seed.const_data_ptr<int64_t>(), args.stream, args.threshold, args.scale};
  dropout(in.const_data_ptr(), dtype, in.numel(), 0, mask, out.mutable_data_ptr(), current_stream());
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(PEFT_KERNELS_NAMESPACE, PEFT_KERNELS_DISPATCH_KEY, m) { m.impl("dropout", dropout_op); }

}  // namespace peft_kernels::cuda
