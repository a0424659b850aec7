// The ops of the NF4 format: tensors to pointers, and registration. Schemas live in peft_kernels/ops/.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <tuple>

#include "nf4_view.h"

namespace peft_kernels::cuda {
namespace {

std::tuple<Tensor, Tensor> quantize_nf4_op(const Tensor& weight, int64_t blocksize) {
  const OnDeviceOf device(weight, "weight");
  const int shift = block_shift_of(blocksize);
  const DType dtype = dtype_of(weight, "weight");
  const Tensor w = weight.contiguous();
  Tensor packed = at::empty({(w.numel() + 1) / 2}, w.options().dtype(at::kByte));
  Tensor absmax = at::empty({ceil_div(w.numel(), blocksize)}, w.options().dtype(at::kFloat));
  quantize_nf4(w.const_data_ptr(), dtype, w.numel(), shift, packed.mutable_data_ptr<uint8_t>(),
               absmax.mutable_data_ptr<float>(), current_stream());
  return {packed, absmax};
}

std::tuple<Tensor, Tensor, Tensor> quantize_absmax_op(const Tensor& absmax) {
  const OnDeviceOf device(absmax, "absmax");
  check_dtype(absmax, at::kFloat, "absmax");
  const Tensor a = absmax.contiguous();
  // torch's mean, as in the reference: another order of summation would give another format.
  const Tensor offset = a.mean();
  Tensor q8 = at::empty(a.sizes(), a.options().dtype(at::kByte)).flatten();
  Tensor absmax2 = at::empty({ceil_div(a.numel(), nf4::kAbsmaxBlock)}, a.options());
  quantize_absmax(a.const_data_ptr<float>(), a.numel(), offset.const_data_ptr<float>(),
                  q8.mutable_data_ptr<uint8_t>(), absmax2.mutable_data_ptr<float>(), current_stream());
  return {q8, absmax2, offset};
}

Tensor unpack_absmax_op(const Tensor& q8, const Tensor& absmax2, const Tensor& offset) {
  const OnDeviceOf device(q8, "q8");
  check_dtype(q8, at::kByte, "q8");
  check_dtype(absmax2, at::kFloat, "absmax2");
  check_dtype(offset, at::kFloat, "offset");
  check_numel(absmax2, ceil_div(q8.numel(), nf4::kAbsmaxBlock), "absmax2");
  check_numel(offset, 1, "offset");
  const Tensor codes = q8.contiguous(), scales = absmax2.contiguous();
  Tensor absmax = at::empty({codes.numel()}, scales.options());
  unpack_absmax(codes.const_data_ptr<uint8_t>(), scales.const_data_ptr<float>(),
                offset.const_data_ptr<float>(), codes.numel(), absmax.mutable_data_ptr<float>(),
                current_stream());
  return absmax;
}

Tensor dequantize_nf4_op(const Tensor& packed, const Tensor& absmax, const OptionalTensor& absmax2,
                         const OptionalTensor& offset, int64_t layout, at::IntArrayRef shape,
                         at::ScalarType dtype) {
  const OnDeviceOf device(packed, "packed");
  Tensor out = at::empty(shape, packed.options().dtype(dtype));
  const int64_t rows = rows_of(out), cols = shape.empty() ? 1 : shape.back();
  const Nf4Tensors weight(packed, absmax, absmax2, offset, layout, rows, cols);
  dequantize(weight, {0, rows, 0, cols, cols}, out.mutable_data_ptr(), dtype_of(out, "dtype"), cols,
             current_stream());
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(PEFT_KERNELS_NAMESPACE, PEFT_KERNELS_DISPATCH_KEY, m) {
  m.impl("quantize_nf4", quantize_nf4_op);
  m.impl("quantize_absmax", quantize_absmax_op);
  m.impl("unpack_absmax", unpack_absmax_op);
  m.impl("dequantize_nf4", dequantize_nf4_op);
}

}  // namespace peft_kernels::cuda
