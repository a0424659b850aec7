// Bottleneck adapters: tensors to pointers, and registration. Schemas live in peft_kernels/ops/.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <tuple>

#include "../core/composed.h"
#include "../core/runtime.h"
#include "bottleneck_view.h"

namespace peft_kernels::cuda {
namespace {

// The LoRA adapter whose GEMMs are those of down and up.
LoraBatch as_lora(const BottleneckView& view) {
  return {view.dtype,
          view.m,
          view.k,
          nullptr,
          view.rank,
          {{view.down, view.up, view.down_dtype, view.up_dtype, view.rank, 0, 0, view.scaling, 0,
            DropoutMask{nullptr, 0, 0, 1.0f}}}};
}

std::tuple<Tensor, Tensor> bottleneck_op(const Tensor& x, const OptionalTensor& residual_in,
                                         const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                                         double norm_eps, const Tensor& down,
                                         const OptionalTensor& down_bias_in, const Tensor& up,
                                         const OptionalTensor& up_bias_in, c10::string_view activation,
                                         double scaling, double dropout_p, const OptionalTensor& seed) {
  const OnDeviceOf device(x, "x");
  const BottleneckArgs args(x, norm_weight, norm_bias, down, up, activation, scaling, dropout_p, seed);
  const Tensor down_bias = args.fp32_vector(down_bias_in, args.r, "down_bias");
  const Tensor up_bias = args.fp32_vector(up_bias_in, args.n, "up_bias");
  if (!residual_in) args.check_residual_shape();
  const Tensor y = at::empty(sizes_with_last(x, args.n), x.options());
  const Tensor residual = residual_in ? matching(*residual_in, y, "residual") : args.x;
  if (is_composed(args)) {
    return composed(bottleneck_op, "bottleneck", x, residual_in, norm_weight, norm_bias, norm_eps, down,
                    down_bias_in, up, up_bias_in, activation, scaling, dropout_p, seed);
  }
  const BottleneckView view = view_of(args, seed, down_bias, up_bias);
  const Tensor z = at::empty(sizes_with_last(x, args.r), args.floats());
  CallContext context;
  if (is_fused(view, context.card)) {
    bottleneck(view, args.x.const_data_ptr(), residual.const_data_ptr(), written(z), y.mutable_data_ptr(),
               context.stream);
  } else {
    const LoraBatch lora = as_lora(view);
    const Tensor value = at::empty({args.m, args.r}, args.floats());
    lora_h(lora, args.x.const_data_ptr(), written(z), context);
    bottleneck_between(view, written(z), written(value), context.stream);
    lora_y(lora, args.n, read(value), residual.const_data_ptr(), view.up_bias, y.mutable_data_ptr(),
           context.stream);
  }
  return {y, z};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bottleneck_backward_op(
    const Tensor& dy_in, const Tensor& x, const Tensor& z_in, const OptionalTensor& norm_weight,
    const OptionalTensor& norm_bias, double norm_eps, const Tensor& down, const Tensor& up,
    c10::string_view activation, double scaling, double dropout_p, const OptionalTensor& seed, bool adds_dy,
    bool need_dx, bool need_dnorm, bool need_ddown, bool need_ddown_bias, bool need_dup, bool need_dup_bias) {
  const OnDeviceOf device(dy_in, "dy");
  const BottleneckArgs args(x, norm_weight, norm_bias, down, up, activation, scaling, dropout_p, seed);
  const BottleneckGradient given(args, x, dy_in, z_in, adds_dy);
  const Tensor &dy = given.dy, &z = given.z;
  if (is_composed(args)) {
    return composed(bottleneck_backward_op, "bottleneck_backward", dy_in, x, z_in, norm_weight, norm_bias,
                    norm_eps, down, up, activation, scaling, dropout_p, seed, adds_dy, need_dx, need_dnorm,
                    need_ddown, need_ddown_bias, need_dup, need_dup_bias);
  }
  const Tensor dx = empty_unless(need_dx, x), ddown = empty_unless(need_ddown, down),
               dup = empty_unless(need_dup, up);
  const bool need_dz = need_dx || need_ddown || need_ddown_bias;
  const BottleneckView view = view_of(args, seed);
  const LoraBatch lora = as_lora(view);
  const void* term = adds_dy ? dy.const_data_ptr() : nullptr;
  const bool fused = need_dz && is_fused(view, current_card());
  Tensor value, dz;
  if (need_dup) value = at::empty(z.sizes(), args.floats());
  if (need_ddown || need_ddown_bias || (need_dz && !fused)) dz = at::empty(z.sizes(), args.floats());
  if (fused) {
    bottleneck_backward(view, dy.const_data_ptr(), read(z), term, written(value), written(dz),
                        need_dx ? dx.mutable_data_ptr() : nullptr, current_stream());
  } else if (need_dz || need_dup) {
    if (need_dz) {
      CallContext context;
      lora_dh(lora, {{dy.const_data_ptr(), args.n}}, written(dz), context);
    }
    bottleneck_between_backward(view, read(z), written(value), written(dz), current_stream());
    if (need_dx) {
      lora_dx(lora, term ? std::vector<const void*>{term} : std::vector<const void*>{}, read(dz),
              dx.mutable_data_ptr(), current_stream());
    }
  }
  if (need_ddown) {
    CallContext context;
    lora_da(lora, args.x.const_data_ptr(), read(dz), {ddown.mutable_data_ptr()}, context);
  }
  if (need_dup) {
    CallContext context;
    lora_db(lora, {{dy.const_data_ptr(), args.n}}, read(value), {dup.mutable_data_ptr()}, context);
  }
  const Tensor no_norm = at::empty({0}, x.options());
  const auto no_sums = [&] { return at::empty({0}, args.floats()); };
  return {dx,
          no_norm,
          no_sums(),
          ddown,
          need_ddown_bias ? dz.sum(0) : no_sums(),
          dup,
          need_dup_bias ? dy.sum(0, false, at::kFloat) * args.scaling : no_sums()};
}

}  // namespace

TORCH_LIBRARY_IMPL(PEFT_KERNELS_NAMESPACE, PEFT_KERNELS_DISPATCH_KEY, m) {
  m.impl("bottleneck", bottleneck_op);
  m.impl("bottleneck_backward", bottleneck_backward_op);
}

}  // namespace peft_kernels::cuda
