// Tensors to the views that kernels take.
#pragma once

#include "../common/nf4_tensors.h"
#include "params.h"

namespace peft_kernels::cpu {

// An NF4 weight and the tensors that keep its bytes alive.
class Nf4Holder {
 public:
  Nf4Holder(const Tensor& packed, const Tensor& absmax, const OptionalTensor& absmax2,
            const OptionalTensor& offset, int64_t blocksize, int64_t numel)
      : tensors_(packed, absmax, absmax2, offset, blocksize, numel) {
    view_.packed = tensors_.packed();
    view_.block_shift = tensors_.block_shift();
    if (tensors_.is_nested()) {
      view_.q8 = tensors_.q8();
      view_.absmax2 = tensors_.absmax2();
      view_.offset = *tensors_.offset();
    } else {
      view_.absmax = tensors_.absmax();
    }
  }
  Nf4Holder(const Nf4Holder&) = delete;
  Nf4Holder& operator=(const Nf4Holder&) = delete;

  const Nf4View& view() const { return view_; }
  // As a matrix with `cols` elements a row.
  MatrixView matrix(int64_t cols) const { return {nullptr, DType::kF32, cols, &view_}; }

 private:
  Nf4Tensors tensors_;
  Nf4View view_{};
};

// A dense row-major matrix; the tensor must outlive the view.
inline MatrixView dense_matrix(const Tensor& t, const char* name) {
  return {t.const_data_ptr(), dtype_of(t, name), t.size(-1), nullptr};
}

}  // namespace peft_kernels::cpu
