// The checked, contiguous tensors of a packed weight, or of several of one size.
#pragma once

#include "checks.h"
#include "codes.h"

namespace peft_kernels {

class Nf4Tensors {
 public:
  Nf4Tensors(const Tensor& packed, const Tensor& absmax, const OptionalTensor& absmax2,
             const OptionalTensor& offset, int64_t layout, int64_t numel, int64_t count = 1)
      : codes_(kCodeValues + codes_of(layout)), block_shift_(block_shift_of(layout)) {
    check_dtype(packed, at::kByte, "packed");
    const int64_t bytes = count * ((numel + 1) / 2);
    TORCH_CHECK(packed.numel() == bytes, "packed: expected ", bytes, " bytes, got ", packed.numel());
    const int64_t blocks = ceil_div(numel, blocksize_of(layout));
    TORCH_CHECK(absmax2.has_value() || !offset.has_value(),
                "absmax2, offset: expected both or neither, got only offset");
    if (absmax2 && !offset) {
      check_dtype(absmax, at::kByte, "absmax");
      check_dtype(*absmax2, at::kFloat, "absmax2");
      TORCH_CHECK(absmax2->numel() == kScaleCodes || absmax2->numel() == count * kScaleCodes,
                  "absmax2: expected ", kScaleCodes, " values of scale codes without an offset, got ",
                  absmax2->numel());
      absmax2_ = absmax2->contiguous();
    } else if (absmax2) {
      check_dtype(absmax, at::kByte, "absmax");
      check_dtype(*absmax2, at::kFloat, "absmax2");
      check_dtype(*offset, at::kFloat, "offset");
      check_numel(*absmax2, count * ceil_div(blocks, nf4::kAbsmaxBlock), "absmax2");
      check_numel(*offset, count, "offset");
      absmax2_ = absmax2->contiguous();
      offset_ = offset->contiguous();
    } else {
      check_dtype(absmax, at::kFloat, "absmax");
    }
    check_numel(absmax, count * blocks, "absmax");
    packed_ = packed.contiguous();
    absmax_ = absmax.contiguous();
  }

  const CodeValues& codes() const { return *codes_; }
  int block_shift() const { return block_shift_; }
  // Double quantisation.
  bool is_nested() const { return offset_.defined(); }
  // Scales are codes of values in a table.
  bool has_scale_values() const { return absmax2_.defined() && !is_nested(); }
  const uint8_t* packed() const { return packed_.const_data_ptr<uint8_t>(); }
  const float* absmax() const { return absmax_.const_data_ptr<float>(); }
  // With double quantisation, or a table.
  const uint8_t* q8() const { return absmax_.const_data_ptr<uint8_t>(); }
  const float* absmax2() const { return absmax2_.const_data_ptr<float>(); }
  // The values of the scale codes of one of several weights.
  const float* scale_values(int64_t index) const {
    return absmax2() + (absmax2_.numel() == kScaleCodes ? 0 : index * kScaleCodes);
  }
  const float* offset() const { return offset_.const_data_ptr<float>(); }

 private:
  const CodeValues* codes_;
  int block_shift_;
  Tensor packed_, absmax_, absmax2_, offset_;
};

}  // namespace peft_kernels
