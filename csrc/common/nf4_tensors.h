// The checked, contiguous tensors of a packed weight (rows, cols), or of several of one size.
#pragma once

#include "checks.h"
#include "codes.h"
#include "integers.h"

namespace peft_kernels {

class Nf4Tensors {
 public:
  Nf4Tensors(const Tensor& packed, const Tensor& absmax, const OptionalTensor& absmax2,
             const OptionalTensor& offset, int64_t layout, int64_t rows, int64_t cols, int64_t count = 1)
      : block_shift_(block_shift_of(layout)), code_kind_(codes_of(layout)), cols_(cols) {
    check_dtype(packed, at::kByte, "packed");
    bytes_ = has_bytes() ? rows * cols : (rows * cols + 1) / 2;
    TORCH_CHECK(packed.numel() == count * bytes_, "packed: expected ", count * bytes_, " bytes, got ",
                packed.numel());
    const int64_t row_blocks = (rows + (int64_t{1} << row_shift()) - 1) >> row_shift();
    blocks_ = has_bytes() ? row_blocks * blocks_in_row() : ceil_div(rows * cols, blocksize_of(layout));
    check_numel(absmax, count * blocks_, "absmax");
    if (code_kind_ == kInt4Codes) {
      check_halves(absmax, absmax2, offset, count);
    } else {
      check_scales(absmax, absmax2, offset, count);
    }
    packed_ = packed.contiguous();
    absmax_ = absmax.contiguous();
  }

  // Of four bits; null: of eight. With zero points the first of kInt4Values.
  const CodeValues* codes() const {
    return has_bytes() ? nullptr : has_zero_points() ? kInt4Values.at : kCodeValues + code_kind_;
  }
  int64_t code_kind() const { return code_kind_; }
  // A code is a byte: E4M3 or int8.
  bool has_bytes() const { return code_kind_ >= kCodeKinds; }
  bool has_int8() const { return code_kind_ == kInt8Codes; }
  int block_shift() const { return block_shift_; }
  // log2 of the rows that share a scale.
  int row_shift() const {
    return code_kind_ == kE4M3Codes && block_shift_ != kWholeRowShift ? block_shift_ : 0;
  }
  int64_t cols() const { return cols_; }
  // Scales of a row of bytes.
  int64_t blocks_in_row() const {
    return block_shift_ == kWholeRowShift ? 1 : (cols_ + (int64_t{1} << block_shift_) - 1) >> block_shift_;
  }
  // Of one weight.
  int64_t bytes() const { return bytes_; }
  int64_t blocks() const { return blocks_; }
  // Double quantisation.
  bool is_nested() const { return offset_.defined() && absmax2_.defined(); }
  // Scales are codes of values in a table.
  bool has_scale_values() const { return absmax2_.defined() && !offset_.defined(); }
  bool has_half_scales() const { return code_kind_ == kInt4Codes; }
  bool has_zero_points() const { return offset_.defined() && !absmax2_.defined(); }
  const uint8_t* packed() const { return packed_.const_data_ptr<uint8_t>(); }
  const float* absmax() const { return absmax_.const_data_ptr<float>(); }
  const uint16_t* half_scales() const { return static_cast<const uint16_t*>(absmax_.const_data_ptr()); }
  DType scale_dtype() const {
    return absmax_.scalar_type() == at::kHalf ? DType::kF16 : has_half_scales() ? DType::kBF16 : DType::kF32;
  }
  const uint8_t* zero_points() const { return offset_.const_data_ptr<uint8_t>(); }
  // With double quantisation, or a table.
  const uint8_t* q8() const { return absmax_.const_data_ptr<uint8_t>(); }
  const float* absmax2() const { return absmax2_.const_data_ptr<float>(); }
  // The values of the scale codes of one of several weights.
  const float* scale_values(int64_t index) const {
    return absmax2() + (absmax2_.numel() == kScaleCodes ? 0 : index * kScaleCodes);
  }
  const float* offset() const { return offset_.const_data_ptr<float>(); }

 private:
  void check_scales(const Tensor& absmax, const OptionalTensor& absmax2, const OptionalTensor& offset,
                    int64_t count) {
    TORCH_CHECK(absmax2.has_value() || !offset.has_value(),
                "absmax2, offset: expected both or neither, got only offset");
    TORCH_CHECK(!absmax2 || !has_bytes(), "absmax2: expected none for codes of 8 bits, got one");
    check_dtype(absmax, absmax2 ? at::kByte : at::kFloat, "absmax");
    if (!absmax2) return;
    check_dtype(*absmax2, at::kFloat, "absmax2");
    if (offset) {
      check_dtype(*offset, at::kFloat, "offset");
      check_numel(*absmax2, count * ceil_div(blocks_, nf4::kAbsmaxBlock), "absmax2");
      check_numel(*offset, count, "offset");
      offset_ = offset->contiguous();
    } else {
      TORCH_CHECK(absmax2->numel() == kScaleCodes || absmax2->numel() == count * kScaleCodes,
                  "absmax2: expected ", kScaleCodes, " values of scale codes without an offset, got ",
                  absmax2->numel());
    }
    absmax2_ = absmax2->contiguous();
  }

  void check_halves(const Tensor& absmax, const OptionalTensor& absmax2, const OptionalTensor& offset,
                    int64_t count) {
    check_device(absmax, "absmax");
    TORCH_CHECK(absmax.scalar_type() == at::kHalf || absmax.scalar_type() == at::kBFloat16,
                "absmax: expected Half or BFloat16 for int4, got ", absmax.scalar_type());
    TORCH_CHECK(!absmax2, "absmax2: expected none for int4, got one");
    if (!offset) return;
    check_dtype(*offset, at::kByte, "offset");
    check_numel(*offset, count * blocks_, "offset");
    offset_ = offset->contiguous();
  }

  int block_shift_;
  int64_t code_kind_, cols_, bytes_ = 0, blocks_ = 0;
  Tensor packed_, absmax_, absmax2_, offset_;
};

}  // namespace peft_kernels
