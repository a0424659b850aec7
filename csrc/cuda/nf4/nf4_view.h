// An NF4 weight's tensors as the pointers that kernels take.
#pragma once

#include "../../common/nf4_tensors.h"
#include "../core/runtime.h"
#include "nf4.h"

namespace peft_kernels::cuda {

inline Nf4View view_of(const Nf4Tensors& weight) {
  Nf4View view{};
  view.packed = view.scale_code = weight.packed();
  view.block_shift = weight.block_shift();
  view.first_code = static_cast<int>(&weight.codes() - kCodeValues) * nf4::kCodes;
  if (weight.is_nested()) {
    view.scale_code = weight.q8();
    view.scale = weight.absmax2();
    view.scale_offset = weight.offset();
    view.scale_shift = nf4::kAbsmaxBlockShift;
  } else if (weight.has_scale_values()) {
    view.scale_code = weight.q8();
    view.scale_values = weight.scale_values(0);
  } else {
    view.scale = weight.absmax();
  }
  return view;
}

}  // namespace peft_kernels::cuda
