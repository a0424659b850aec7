// An NF4 weight's tensors as the pointers that kernels take.
#pragma once

#include "../../common/nf4_tensors.h"
#include "../core/runtime.h"
#include "nf4.h"

namespace peft_kernels::cuda {

inline Nf4View view_of(const Nf4Tensors& weight) {
  if (weight.is_nested()) {
    return {weight.packed(),        weight.q8(),         weight.absmax2(), weight.offset(),
            nf4::kAbsmaxBlockShift, weight.block_shift()};
  }
  return {weight.packed(), weight.packed(), weight.absmax(), nullptr, 0, weight.block_shift()};
}

}  // namespace peft_kernels::cuda
