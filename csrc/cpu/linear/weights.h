// Weights as views for the kernels.
#pragma once

#include "../../common/lora_args.h"
#include "../../common/nf4_tensors.h"
#include "../isa/isa.h"

namespace peft_kernels::cpu {

// An NF4 weight, or several of one size in one tensor, which it keeps alive.
class Nf4Holder {
 public:
  Nf4Holder(const Tensor& packed, const Tensor& absmax, const OptionalTensor& absmax2,
            const OptionalTensor& offset, int64_t blocksize, int64_t numel, int64_t count = 1)
      : tensors_(packed, absmax, absmax2, offset, blocksize, numel, count), numel_(numel) {
    view_.packed = tensors_.packed();
    view_.block_shift = tensors_.block_shift();
    if (tensors_.is_nested()) {
      view_.q8 = tensors_.q8();
      view_.absmax2 = tensors_.absmax2();
      if (count > 0) view_.offset = *tensors_.offset();
    } else {
      view_.absmax = tensors_.absmax();
    }
  }
  Nf4Holder(const Nf4Holder&) = delete;
  Nf4Holder& operator=(const Nf4Holder&) = delete;

  const Nf4View& view() const { return view_; }
  // One of several.
  Nf4View view(int64_t index) const {
    const int64_t blocks = ceil_div(numel_, int64_t{1} << view_.block_shift);
    Nf4View view = view_;
    view.packed += index * ((numel_ + 1) / 2);
    if (!tensors_.is_nested()) {
      view.absmax += index * blocks;
      return view;
    }
    view.q8 += index * blocks;
    view.absmax2 += index * ceil_div(blocks, nf4::kAbsmaxBlock);
    view.offset = tensors_.offset()[index];
    return view;
  }
  // The weight as a matrix with `cols` elements per row.
  MatrixView matrix(int64_t cols) const { return {nullptr, DType::kF32, cols, &view_}; }

 private:
  Nf4Tensors tensors_;
  int64_t numel_;
  Nf4View view_{};
};

// A dense row-major matrix; the tensor must outlive the view.
inline MatrixView dense_matrix(const Tensor& t, const char* name) {
  return {t.const_data_ptr(), dtype_of(t, name), t.size(-1), nullptr};
}

// Whether torch computes GEMMs with a dense weight and this many rows, because ours are not as fast.
inline bool is_torchs_product(const Tensor& weight, int64_t rows) {
  return !(weight.scalar_type() == at::kBFloat16 && weight.is_contiguous() && rows > kFewRows &&
           has_fast_dense());
}

// Whether linear_gemv_dense.inl beats torch here, reading the weight once at the speed of the memory. Not for
// a thin weight: the sums of a row would depend on the GEMM's other terms.
inline bool has_dense_gemv(const Tensor& weight, int64_t rows) {
  constexpr int64_t kWholeVectors = 32;  // elements, for every ISA
  const int64_t depth = weight.size(-1);
  if (!weight.is_contiguous() || depth % kWholeVectors != 0 || depth <= kThinDepth) return false;
  return weight.scalar_type() == at::kFloat
             ? rows <= kFewFloatRows
             : weight.scalar_type() == at::kBFloat16 && kernels().has_pairs && rows <= kFewRows;
}

// The frozen weight of a layer.
class BaseWeight : public BaseWeightOf<Nf4Holder> {
 public:
  using BaseWeightOf::BaseWeightOf;
  bool is_torchs(int64_t rows) const { return is_dense() && is_torchs_product(dense(), rows); }
  MatrixView matrix() const {
    return is_dense() ? dense_matrix(dense(), "weight") : nf4().matrix(in_features());
  }
};

}  // namespace peft_kernels::cpu
