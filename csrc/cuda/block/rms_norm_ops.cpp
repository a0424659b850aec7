// The ops of RMS norms: tensors to pointers, and registration. Schemas live in peft_kernels/ops/.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <tuple>
#include <utility>

#include "../../common/rms_norm_args.h"
#include "../core/runtime.h"
#include "rms_norm.h"

namespace peft_kernels::cuda {
namespace {

// Rows of a view may start anywhere: they are copied, so that the kernels read whole vectors.
Tensor aligned(const Tensor& t) { return are_aligned({t.const_data_ptr()}) ? t : t.clone(); }

// Aligned tensors as the kernels take them.
struct Call {
  Tensor x, weight;
  NormRows rows;

  Call(const RmsNormArgs& args, double offset, bool rounds)
      : x(aligned(args.x)),
        weight(aligned(args.weight)),
        rows{args.m,
             args.features,
             1.0f / static_cast<float>(args.features),
             args.dtype,
             weight.const_data_ptr(),
             dtype_of(weight, "weight"),
             static_cast<float>(offset),
             rounds} {}
};

std::tuple<Tensor, Tensor> rms_norm_op(const Tensor& x, const Tensor& weight, double eps, double offset,
                                       bool rounds, at::ScalarType dtype) {
  const OnDeviceOf device(x, "x");
  const RmsNormArgs args(x, weight);
  const RmsNormResults results(args, x, dtype);
  const Call call(args, offset, rounds);
  rms_norm({call.rows, call.x.const_data_ptr(), args.dtype, nullptr, nullptr, static_cast<float>(eps),
            results.y.mutable_data_ptr(), results.dtype, results.rstd.mutable_data_ptr<float>()},
           current_card(), current_stream());
  return {results.y, results.rstd};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm_op(const Tensor& x_in, const Tensor& residual_in,
                                                   const Tensor& weight, double eps, double offset,
                                                   bool rounds, at::ScalarType dtype) {
  const OnDeviceOf device(x_in, "x");
  check_shape(residual_in, x_in.sizes(), "residual");
  const at::ScalarType type = c10::promoteTypes(x_in.scalar_type(), residual_in.scalar_type());
  Tensor sum = at::empty(x_in.sizes(), x_in.options().dtype(type));
  const RmsNormArgs args(sum, weight);
  const RmsNormResults results(args, sum, dtype);
  const Call call(args, offset, rounds);
  // One of the two may have another dtype than the sum; a sum does not depend on their order.
  const bool swaps = x_in.scalar_type() == type;
  Tensor x = aligned(as_rows(x_in, args.features, "x")),
         residual = aligned(as_rows(residual_in, args.features, "residual"));
  if (swaps) std::swap(x, residual);
  residual = residual.to(type);
  rms_norm({call.rows, x.const_data_ptr(), dtype_of(x, "x"), residual.const_data_ptr(),
            sum.mutable_data_ptr(), static_cast<float>(eps), results.y.mutable_data_ptr(), results.dtype,
            results.rstd.mutable_data_ptr<float>()},
           current_card(), current_stream());
  return {results.y, sum, results.rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward_op(const Tensor& dy_in, const Tensor& x, const Tensor& weight,
                                                const Tensor& rstd, const OptionalTensor& add_in,
                                                double offset, bool rounds, bool need_dx, bool need_dweight) {
  const OnDeviceOf device(dy_in, "dy");
  const RmsNormGradientArgs args(dy_in, x, weight, rstd, add_in);
  const Call call(args, offset, rounds);
  const Tensor dy = aligned(args.dy), add = add_in ? aligned(args.add) : Tensor();
  Tensor dx = empty_unless(need_dx, x), dweight = empty_unless(need_dweight, weight);
  CallContext context;
  if (need_dx || need_dweight) {
    rms_norm_backward(
        {call.rows, dy.const_data_ptr(), args.dy_dtype, call.x.const_data_ptr(),
         args.rstd.const_data_ptr<float>(), add_in ? add.const_data_ptr() : nullptr,
         need_dx ? dx.mutable_data_ptr() : nullptr, need_dweight ? dweight.mutable_data_ptr() : nullptr},
        context);
  }
  return {dx, dweight};
}

}  // namespace

TORCH_LIBRARY_IMPL(PEFT_KERNELS_NAMESPACE, PEFT_KERNELS_DISPATCH_KEY, m) {
  m.impl("rms_norm", rms_norm_op);
  m.impl("add_rms_norm", add_rms_norm_op);
  m.impl("rms_norm_backward", rms_norm_backward_op);
}

}  // namespace peft_kernels::cuda
