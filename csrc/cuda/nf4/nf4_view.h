// A packed weight's tensors as the pointers that kernels take.
#pragma once

#include "../../common/nf4_tensors.h"
#include "../core/runtime.h"
#include "nf4.h"
#include "nf4_groups.h"

namespace peft_kernels::cuda {

// Whether kernels that multiply and sum take it as an Nf4View; others are dequantised.
inline bool has_view(const Nf4Tensors& weight) { return !weight.has_bytes() && !weight.has_half_scales(); }
// Whether all kernels of GEMMs take it; LinearSmall takes scale codes too.
inline bool has_gemms(const Nf4Tensors& weight) { return has_view(weight) && !weight.has_scale_values(); }

// Of a weight that has_view().
inline Nf4View view_of(const Nf4Tensors& weight) {
  Nf4View view{};
  view.packed = view.scale_code = weight.packed();
  view.block_shift = weight.block_shift();
  view.first_code = static_cast<int>(weight.code_kind()) * nf4::kCodes;
  if (weight.is_nested()) {
    view.scale_code = weight.q8();
    view.scale = weight.absmax2();
    view.scale_offset = weight.offset();
    view.scale_shift = nf4::kAbsmaxBlockShift;
  } else if (weight.has_scale_values()) {
    view.scale_code = weight.q8();
    view.scale_values = weight.scale_values(0);
    view.code_of_one = weight.block_shift() == 4 ? kE4M3One : kE8M0One;
  } else {
    view.scale = weight.absmax();
  }
  return view;
}

// One of several weights that have no Nf4View.
inline GroupsView groups_of(const Nf4Tensors& weight, int64_t index = 0) {
  GroupsView view{};
  const int64_t first = index * weight.blocks();
  view.packed = weight.packed() + index * weight.bytes();
  view.has_bytes = weight.has_bytes();
  view.has_int8 = weight.has_int8();
  view.scale = weight.has_bytes() ? static_cast<const void*>(weight.absmax() + first)
                                  : static_cast<const void*>(weight.half_scales() + first);
  view.has_bf16_scales = weight.scale_dtype() == DType::kBF16;
  if (weight.has_zero_points()) view.zero_points = weight.zero_points() + first;
  view.block_shift = weight.block_shift();
  view.row_shift = weight.row_shift();
  view.blocks_in_row = weight.has_bytes() ? weight.blocks_in_row() : 0;
  return view;
}

// `out` has the size of the part and `out_stride` elements from row to row.
inline void dequantize(const Nf4Tensors& weight, const Part& part, void* out, DType dtype, int64_t out_stride,
                       Stream stream) {
  has_view(weight) ? dequantize_nf4(view_of(weight), part, out, dtype, out_stride, stream)
                   : dequantize_groups(groups_of(weight), part, out, dtype, out_stride, stream);
}

}  // namespace peft_kernels::cuda
