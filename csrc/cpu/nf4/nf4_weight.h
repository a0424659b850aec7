// NF4 weights as views for the kernels.
#pragma once

#include "../../common/nf4_tensors.h"
#include "../core/kernel_table.h"

namespace peft_kernels::cpu {

// An NF4 weight, or several of one size in one tensor, which it keeps alive.
class Nf4Weight {
 public:
  Nf4Weight(const Tensor& packed, const Tensor& absmax, const OptionalTensor& absmax2,
            const OptionalTensor& offset, int64_t layout, int64_t numel, int64_t count = 1)
      : tensors_(packed, absmax, absmax2, offset, layout, numel, count), numel_(numel) {
    view_.codes = &tensors_.codes();
    view_.packed = tensors_.packed();
    view_.block_shift = tensors_.block_shift();
    if (tensors_.is_nested()) {
      view_.q8 = tensors_.q8();
      view_.scale_values = nf4::kDynamicMap;
      view_.absmax2 = tensors_.absmax2();
      if (count > 0) view_.offset = *tensors_.offset();
    } else if (tensors_.has_scale_values()) {
      view_.q8 = tensors_.q8();
      view_.scale_values = tensors_.scale_values(0);
    } else {
      view_.absmax = tensors_.absmax();
    }
  }
  Nf4Weight(const Nf4Weight&) = delete;
  Nf4Weight& operator=(const Nf4Weight&) = delete;

  const Nf4View& view() const { return view_; }
  // One of several.
  Nf4View view(int64_t index) const {
    const int64_t blocks = ceil_div(numel_, int64_t{1} << view_.block_shift);
    Nf4View view = view_;
    view.packed += index * ((numel_ + 1) / 2);
    if (view.absmax) {
      view.absmax += index * blocks;
      return view;
    }
    view.q8 += index * blocks;
    if (tensors_.is_nested()) {
      view.absmax2 += index * ceil_div(blocks, nf4::kAbsmaxBlock);
      view.offset = tensors_.offset()[index];
    } else {
      view.scale_values = tensors_.scale_values(index);
    }
    return view;
  }
  // The weight as a matrix with `cols` elements per row.
  MatrixView matrix(int64_t cols) const { return {nullptr, DType::kF32, cols, &view_}; }

 private:
  Nf4Tensors tensors_;
  int64_t numel_;
  Nf4View view_{};
};

}  // namespace peft_kernels::cpu
