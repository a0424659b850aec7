// Ops that quantise to NF4 and dequantise. Schemas are in Python.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <tuple>

#include "../core/kernel_table.h"
#include "../core/namespace.h"
#include "../core/parallel.h"
#include "nf4_weight.h"

namespace peft_kernels {

void check_device(const Tensor& t, const char* name) {
  TORCH_CHECK(t.device().is_cpu(), name, ": expected a CPU tensor, got one on ", t.device());
}

namespace cpu {
namespace {

// Elements per thread below which no further thread is woken.
constexpr int64_t kQuantizeGrain = 16384;
constexpr int64_t kDequantizeGrain = 65536;

std::tuple<Tensor, Tensor> quantize_nf4(const Tensor& weight, int64_t blocksize) {
  const int shift = block_shift_of(blocksize);
  const DType dtype = dtype_of(weight, "weight");
  const Tensor w = weight.contiguous();
  const int64_t n = w.numel(), blocks = ceil_div(n, blocksize);
  Tensor packed = at::empty({(n + 1) / 2}, w.options().dtype(at::kByte));
  Tensor absmax = at::empty({blocks}, w.options().dtype(at::kFloat));
  const QuantizeParams params{w.const_data_ptr(),
                              dtype,
                              n,
                              shift,
                              packed.mutable_data_ptr<uint8_t>(),
                              absmax.mutable_data_ptr<float>()};
  const auto quantize = kernels().quantize;
  parallel_for(0, blocks, ceil_div(kQuantizeGrain, blocksize),
               [&](int64_t begin, int64_t end) { quantize(params, begin, end); });
  return {packed, absmax};
}

std::tuple<Tensor, Tensor, Tensor> quantize_absmax(const Tensor& absmax) {
  check_dtype(absmax, at::kFloat, "absmax");
  const Tensor a = absmax.contiguous();
  const int64_t blocks = a.numel(), groups = ceil_div(blocks, nf4::kAbsmaxBlock);
  const Tensor offset = a.mean();
  Tensor q8 = at::empty({blocks}, a.options().dtype(at::kByte));
  Tensor absmax2 = at::empty({groups}, a.options());
  const AbsmaxParams params{a.const_data_ptr<float>(), blocks, *offset.const_data_ptr<float>(),
                            q8.mutable_data_ptr<uint8_t>(), absmax2.mutable_data_ptr<float>()};
  const auto quantize_absmax = kernels().quantize_absmax;
  parallel_for(0, groups, kQuantizeGrain / nf4::kAbsmaxBlock,
               [&](int64_t begin, int64_t end) { quantize_absmax(params, begin, end); });
  return {q8, absmax2, offset};
}

Tensor unpack_absmax(const Tensor& q8, const Tensor& absmax2, const Tensor& offset) {
  check_dtype(q8, at::kByte, "q8");
  check_dtype(absmax2, at::kFloat, "absmax2");
  check_dtype(offset, at::kFloat, "offset");
  const Tensor codes = q8.contiguous(), scales = absmax2.contiguous();
  check_numel(scales, ceil_div(codes.numel(), nf4::kAbsmaxBlock), "absmax2");
  check_numel(offset, 1, "offset");
  Tensor absmax = at::empty({codes.numel()}, scales.options());
  const uint8_t* in = codes.const_data_ptr<uint8_t>();
  const float* scale = scales.const_data_ptr<float>();
  const float center = *offset.const_data_ptr<float>();
  float* out = absmax.mutable_data_ptr<float>();
  parallel_for(0, codes.numel(), kDequantizeGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      out[i] = nf4::kDynamicMap[in[i]] * scale[i >> nf4::kAbsmaxBlockShift] + center;
    }
  });
  return absmax;
}

Tensor dequantize_nf4(const Tensor& packed, const Tensor& absmax, const OptionalTensor& absmax2,
                      const OptionalTensor& offset, int64_t layout, at::IntArrayRef shape,
                      at::ScalarType dtype) {
  Tensor out = at::empty(shape, packed.options().dtype(dtype));
  const DType out_dtype = dtype_of(out, "dtype");
  const int64_t rows = rows_of(out), cols = shape.empty() ? 1 : shape.back();
  const Nf4Weight weight(packed, absmax, absmax2, offset, layout, rows, cols);
  void* data = out.mutable_data_ptr();
  const auto dequantize = kernels().dequantize;
  // Whole blocks, so that a table is built once and every thread starts in a high nibble; of E4M3 whole rows.
  const int64_t blocksize = weight.view().codes ? blocksize_of(layout) : std::max<int64_t>(cols, 1);
  const int64_t blocks = ceil_div(out.numel(), blocksize);
  parallel_for(0, blocks, ceil_div(kDequantizeGrain, blocksize), [&](int64_t begin, int64_t end) {
    dequantize(weight.view(), begin * blocksize, std::min(end * blocksize, out.numel()), out_dtype, data);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(PEFT_KERNELS_NAMESPACE, CPU, m) {
  m.impl("quantize_nf4", quantize_nf4);
  m.impl("quantize_absmax", quantize_absmax);
  m.impl("unpack_absmax", unpack_absmax);
  m.impl("dequantize_nf4", dequantize_nf4);
}

}  // namespace cpu
}  // namespace peft_kernels
