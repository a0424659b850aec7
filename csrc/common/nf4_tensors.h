// The checked, contiguous tensors of an NF4 weight, or of several of one size.
#pragma once

#include "checks.h"

namespace peft_kernels {

class Nf4Tensors {
 public:
  Nf4Tensors(const Tensor& packed, const Tensor& absmax, const OptionalTensor& absmax2,
             const OptionalTensor& offset, int64_t blocksize, int64_t numel, int64_t count = 1)
      : block_shift_(block_shift_of(blocksize)) {
    check_dtype(packed, at::kByte, "packed");
    const int64_t bytes = count * ((numel + 1) / 2);
    TORCH_CHECK(packed.numel() == bytes, "packed: expected ", bytes, " bytes, got ", packed.numel());
    const int64_t blocks = ceil_div(numel, blocksize);
    TORCH_CHECK(absmax2.has_value() == offset.has_value(),
                "absmax2, offset: expected both or neither, got only one of them");
    if (absmax2) {
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

  int block_shift() const { return block_shift_; }
  bool is_nested() const { return absmax2_.defined(); }
  const uint8_t* packed() const { return packed_.const_data_ptr<uint8_t>(); }
  // Without double quantisation.
  const float* absmax() const { return absmax_.const_data_ptr<float>(); }
  // With it.
  const uint8_t* q8() const { return absmax_.const_data_ptr<uint8_t>(); }
  const float* absmax2() const { return absmax2_.const_data_ptr<float>(); }
  const float* offset() const { return offset_.const_data_ptr<float>(); }

 private:
  int block_shift_;
  Tensor packed_, absmax_, absmax2_, offset_;
};

}  // namespace peft_kernels
