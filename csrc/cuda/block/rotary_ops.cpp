// Op rotary: tensors to pointers, and registration. Schemas live in peft_kernels/ops/.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <limits>
#include <vector>

#include "../../common/rotary_args.h"
#include "../core/runtime.h"
#include "rotary.h"

namespace peft_kernels::cuda {
namespace {

RotaryAngles angles_of(const Tensor& t) {
  return {t.const_data_ptr(), t.size(0) == 1 ? 0 : t.stride(0), t.stride(1)};
}

std::vector<Tensor> rotary_op(at::TensorList x, const Tensor& cos_in, const Tensor& sin_in, bool inverse,
                              at::ScalarType dtype) {
  const OnDeviceOf device(cos_in, "cos");
  const RotaryArgs args(x, cos_in, sin_in);
  if (x.empty()) return {};
  // The kernels take angles of x's dtype, or else in fp32.
  const at::ScalarType angle_dtype = args.rounds() ? cos_in.scalar_type() : at::kFloat;
  const Tensor cos = contiguous_in_last(args.cos.to(angle_dtype)),
               sin = contiguous_in_last(args.sin.to(angle_dtype));
  std::vector<Tensor> out;
  std::vector<RotaryHeads> heads;
  for (const Tensor& t : args.x) {
    TORCH_CHECK(t.size(2) * t.size(3) < std::numeric_limits<int>::max(),
                "x: expected less than 2^31 elements in a row, got ", t.sizes());
    Tensor& y = out.emplace_back(at::empty(t.sizes(), t.options().dtype(dtype)));
    heads.push_back(
        {t.const_data_ptr(), t.stride(0), t.stride(1), t.stride(2), t.size(2), y.mutable_data_ptr()});
  }
  rotary(
      {heads.data(), static_cast<int64_t>(heads.size()), args.dtype, args.sequences, args.rows, args.features,
       angles_of(cos), angles_of(sin), dtype_of(cos, "cos"), inverse, dtype_of(out[0], "dtype")},
      current_stream());
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(PEFT_KERNELS_NAMESPACE, PEFT_KERNELS_DISPATCH_KEY, m) { m.impl("rotary", rotary_op); }

}  // namespace peft_kernels::cuda
