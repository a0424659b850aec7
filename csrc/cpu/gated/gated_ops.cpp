// Ops gated_activation and gated_activation_backward.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <tuple>

#include "../../common/gated_args.h"
#include "../core/kernel_table.h"
#include "../core/namespace.h"
#include "../core/parallel.h"

namespace peft_kernels::cpu {
namespace {

// An element costs an exponential and a division, a few times as much as a copy.
constexpr int64_t kGatedGrain = kElementwiseGrain / 4;

GatedParams params_of(const GatedArgs& args) {
  GatedParams params{};
  params.gate = args.gate.const_data_ptr();
  params.up = args.up.const_data_ptr();
  params.dtype = args.dtype;
  params.activation = args.activation;
  return params;
}

Tensor gated_activation(const Tensor& gate, const Tensor& up, c10::string_view activation) {
  const GatedArgs args(gate, up, activation);
  Tensor out = at::empty(args.gate.sizes(), args.gate.options());
  GatedParams params = params_of(args);
  params.out = out.mutable_data_ptr();
  const auto gated = kernels().gated;
  parallel_for(0, out.numel(), kGatedGrain, [&](int64_t begin, int64_t end) { gated(params, begin, end); });
  return out;
}

std::tuple<Tensor, Tensor> gated_activation_backward(const Tensor& dy, const Tensor& gate, const Tensor& up,
                                                     c10::string_view activation) {
  const GatedArgs args(gate, up, activation);
  const Tensor d = matching(dy, gate, "dy");
  Tensor d_gate = at::empty(d.sizes(), d.options()), d_up = at::empty(d.sizes(), d.options());
  GatedParams params = params_of(args);
  params.dy = d.const_data_ptr();
  params.d_gate = d_gate.mutable_data_ptr();
  params.d_up = d_up.mutable_data_ptr();
  const auto gated_backward = kernels().gated_backward;
  parallel_for(0, d.numel(), kGatedGrain,
               [&](int64_t begin, int64_t end) { gated_backward(params, begin, end); });
  return {d_gate, d_up};
}

}  // namespace

TORCH_LIBRARY_IMPL(PEFT_KERNELS_NAMESPACE, CPU, m) {
  m.impl("gated_activation", gated_activation);
  m.impl("gated_activation_backward", gated_activation_backward);
}

}  // namespace peft_kernels::cpu
