// The ops of gated activations: tensors to pointers, and registration. Schemas live in peft_kernels/ops/.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <tuple>

#include "../../common/gated_args.h"
#include "../core/runtime.h"
#include "gated.h"

namespace peft_kernels::cuda {
namespace {

Tensor gated_activation_op(const Tensor& gate, const Tensor& up, c10::string_view activation) {
  const OnDeviceOf device(gate, "gate");
  const GatedArgs args(gate, up, activation);
  Tensor out = at::empty(args.gate.sizes(), args.gate.options());
  gated_activation(args.activation, args.gate.const_data_ptr(), args.up.const_data_ptr(), args.dtype,
                   out.numel(), out.mutable_data_ptr(), current_stream());
  return out;
}

std::tuple<Tensor, Tensor> gated_activation_backward_op(const Tensor& dy, const Tensor& gate,
                                                        const Tensor& up, c10::string_view activation) {
  const OnDeviceOf device(dy, "dy");
  const GatedArgs args(gate, up, activation);
  const Tensor d = matching(dy, gate, "dy");
  Tensor d_gate = at::empty(d.sizes(), d.options()), d_up = at::empty(d.sizes(), d.options());
  gated_activation_backward(args.activation, d.const_data_ptr(), args.gate.const_data_ptr(),
                            args.up.const_data_ptr(), args.dtype, d.numel(), d_gate.mutable_data_ptr(),
                            d_up.mutable_data_ptr(), current_stream());
  return {d_gate, d_up};
}

}  // namespace

TORCH_LIBRARY_IMPL(PEFT_KERNELS_NAMESPACE, PEFT_KERNELS_DISPATCH_KEY, m) {
  m.impl("gated_activation", gated_activation_op);
  m.impl("gated_activation_backward", gated_activation_backward_op);
}

}  // namespace peft_kernels::cuda
