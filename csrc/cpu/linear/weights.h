// Weights as views for the kernels.
#pragma once

#include "../../common/lora_args.h"
#include "../nf4/nf4_weight.h"

namespace peft_kernels::cpu {

// A dense row-major matrix; the tensor must outlive the view.
inline MatrixView dense_matrix(const Tensor& t, const char* name) {
  return {t.const_data_ptr(), dtype_of(t, name), t.size(-1), nullptr};
}

// Whether torch computes GEMMs with a dense weight and this many rows, because ours are not as fast.
inline bool uses_torch_gemm(const Tensor& weight, int64_t rows) {
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
class BaseWeight : public BaseWeightOf<Nf4Weight> {
 public:
  using BaseWeightOf::BaseWeightOf;
  bool uses_torch(int64_t rows) const { return is_dense() && uses_torch_gemm(dense(), rows); }
  MatrixView matrix() const {
    return is_dense() ? dense_matrix(dense(), "weight") : nf4().matrix(in_features());
  }
};

}  // namespace peft_kernels::cpu
