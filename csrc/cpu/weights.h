// Weights as the views that kernels take.
#pragma once

#include "../common/lora_args.h"
#include "../common/nf4_tensors.h"
#include "isa.h"

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

// The frozen weight of a layer.
class BaseWeight : public BaseWeightOf<Nf4Holder> {
 public:
  using BaseWeightOf::BaseWeightOf;
  // Whether its products with that many rows are torch's: those of a dense weight, unless ours are as fast.
  bool is_torchs(int64_t rows) const {
    return is_dense() && !(dense().scalar_type() == at::kBFloat16 && dense().is_contiguous() &&
                           rows > kFewRows && has_fast_dense());
  }
  MatrixView matrix() const {
    return is_dense() ? dense_matrix(dense(), "weight") : nf4().matrix(in_features());
  }
};

}  // namespace peft_kernels::cpu
