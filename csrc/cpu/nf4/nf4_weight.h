// Packed weights as views for the kernels.
#pragma once

#include <algorithm>
#include <numeric>

#include "../../common/nf4_tensors.h"
#include "../core/kernel_table.h"

namespace peft_kernels::cpu {

// A packed weight (rows, cols), or several of one size in one tensor, which it keeps alive.
class Nf4Weight {
 public:
  Nf4Weight(const Tensor& packed, const Tensor& absmax, const OptionalTensor& absmax2,
            const OptionalTensor& offset, int64_t layout, int64_t rows, int64_t cols, int64_t count = 1)
      : tensors_(packed, absmax, absmax2, offset, layout, rows, cols, count) {
    view_.codes = tensors_.codes();
    view_.packed = tensors_.packed();
    view_.block_shift = tensors_.block_shift();
    view_.has_int8 = tensors_.has_int8();
    view_.row_shift = tensors_.row_shift();
    view_.cols = cols;
    view_.blocks_in_row = tensors_.has_bytes() ? tensors_.blocks_in_row() : 0;
    if (tensors_.has_half_scales()) {
      view_.half_scales = tensors_.half_scales();
      view_.has_bf16_scales = tensors_.scale_dtype() == DType::kBF16;
      if (tensors_.has_zero_points()) view_.zero_points = tensors_.zero_points();
    } else if (tensors_.is_nested()) {
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
    const int64_t first = index * tensors_.blocks();
    Nf4View view = view_;
    view.packed += index * tensors_.bytes();
    if (view.absmax) {
      view.absmax += first;
    } else if (view.half_scales) {
      view.half_scales += first;
      if (view.zero_points) view.zero_points += first;
    } else if (tensors_.is_nested()) {
      view.q8 += first;
      view.absmax2 += index * ceil_div(tensors_.blocks(), nf4::kAbsmaxBlock);
      view.offset = tensors_.offset()[index];
    } else {
      view.q8 += first;
      view.scale_values = tensors_.scale_values(index);
    }
    return view;
  }
  // Rows at whose multiples blocks of scales begin, nested ones too.
  int64_t row_unit() const {
    if (tensors_.has_bytes()) return int64_t{1} << view_.row_shift;
    const int64_t block = nf4::kAbsmaxBlock << view_.block_shift;
    return block / std::gcd(block, std::max<int64_t>(view_.cols, 1));
  }
  // The rows from `first` on, a multiple of row_unit().
  Nf4View view_from_row(int64_t first) const {
    const int64_t element = first * view_.cols;
    const int64_t block = tensors_.has_bytes() ? (first >> view_.row_shift) * view_.blocks_in_row
                                               : element >> view_.block_shift;
    Nf4View view = view_;
    view.packed += tensors_.has_bytes() ? element : element / 2;
    if (view.absmax) view.absmax += block;
    if (view.half_scales) view.half_scales += block;
    if (view.zero_points) view.zero_points += block;
    if (view.q8) view.q8 += block;
    if (view.absmax2) view.absmax2 += block / nf4::kAbsmaxBlock;
    return view;
  }
  // The weight as a matrix with `cols` elements per row.
  MatrixView matrix(int64_t cols) const { return {nullptr, DType::kF32, cols, &view_}; }

 private:
  Nf4Tensors tensors_;
  Nf4View view_{};
};

}  // namespace peft_kernels::cpu
