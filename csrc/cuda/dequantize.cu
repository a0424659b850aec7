#include <algorithm>

#include "../common/integers.h"
#include "dequantize.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace peft_kernels::cuda {
namespace {

AbsmaxReader absmax_of(const Nf4View& weight) {
  return {weight.absmax, weight.q8, weight.absmax2, weight.offset};
}

template <class T, bool kAligned>
Status launch_part(const Nf4View& weight, const Part& part, void* out, int64_t out_stride, Stream stream) {
  using Kernel = DequantizeNf4<T, kAligned>;
  typename Kernel::Params params{};
  params.packed = weight.packed;
  params.absmax = absmax_of(weight);
  params.block_shift = weight.block_shift;
  params.first = part.row_begin * part.ld + part.col_begin;
  params.ld = part.ld;
  params.cols = part.col_end - part.col_begin;
  params.units_per_row = ceil_div(params.cols, Kernel::kUnit);
  params.out = static_cast<T*>(out);
  params.out_stride = out_stride;
  std::copy_n(nf4::kCode, nf4::kCodes, params.code);
  std::copy_n(nf4::kDynamicMap, nf4::kDynamicCodes, params.map);
  int64_t rows = part.row_end - part.row_begin;
  if (rows == 0 || params.cols == 0) return 0;
  // The kernel divides 32-bit units.
  const int64_t rows_at_once = std::max<int64_t>(1, (int64_t{1} << 32) / params.units_per_row - 1);
  for (; rows > 0; rows -= rows_at_once) {
    params.units = std::min(rows, rows_at_once) * params.units_per_row;
    const Status status = launch<Kernel>(params, ceil_div(params.units, Kernel::kThreads * Kernel::kUnits),
                                         stream, sizeof(typename Kernel::Shared));
    if (status != 0) return status;
    params.first += rows_at_once * params.ld;
    params.out += rows_at_once * out_stride;
  }
  return 0;
}

// Whether every unit starts in a high nibble of an aligned word, inside one block, and where 16 bytes can be
// written.
bool is_aligned(const Nf4View& weight, const Part& part, const void* out, DType dtype, int64_t out_stride) {
  constexpr int kUnit = DequantizeNf4<float, true>::kUnit;
  const bool one_row = part.row_end - part.row_begin == 1;
  return reinterpret_cast<uintptr_t>(weight.packed) % 4 == 0 && reinterpret_cast<uintptr_t>(out) % 16 == 0 &&
         (part.row_begin * part.ld + part.col_begin) % kUnit == 0 &&
         (one_row || (part.ld % kUnit == 0 && out_stride * size_of(dtype) % 16 == 0));
}

}  // namespace

Status dequantize_nf4(const Nf4View& weight, const Part& part, void* out, DType dtype, int64_t out_stride,
                      Stream stream) {
  Part flat = part;
  if (part.col_begin == 0 && part.col_end == part.ld && out_stride == part.ld) {
    // Whole rows, close together: one long row, whatever their length.
    flat = {0, 1, part.row_begin * part.ld, part.row_end * part.ld, 0};
  }
  return with_type(dtype, [&](auto type) {
    using T = decltype(type);
    return is_aligned(weight, flat, out, dtype, out_stride)
               ? launch_part<T, true>(weight, flat, out, out_stride, stream)
               : launch_part<T, false>(weight, flat, out, out_stride, stream);
  });
}

Status unpack_absmax(const uint8_t* q8, const float* absmax2, const float* offset, int64_t blocks,
                     float* absmax, Stream stream) {
  UnpackAbsmax::Params params{{nullptr, q8, absmax2, offset}, blocks, absmax, {}};
  std::copy_n(nf4::kDynamicMap, nf4::kDynamicCodes, params.map);
  return launch<UnpackAbsmax>(params, ceil_div(blocks, UnpackAbsmax::kThreads * UnpackAbsmax::kPerThread),
                              stream, sizeof(UnpackAbsmax::Shared));
}

}  // namespace peft_kernels::cuda
