// Checked arguments of the expert ops: rows sorted by expert, and matrices stacked over the experts.
#pragma once

#include <memory>
#include <optional>
#include <vector>

#include "../core/parallel.h"
#include "../linear/weights.h"

namespace peft_kernels::cpu {

// The rows of one expert.
struct ExpertRows {
  int64_t expert, begin, end;
  int64_t count() const { return end - begin; }
};

// The experts that have rows. The memory safety of everything that is read or written by rows rests on these
// checks.
inline std::vector<ExpertRows> expert_rows(const Tensor& ends, int64_t rows) {
  check_dtype(ends, at::kInt, "ends");
  TORCH_CHECK(ends.dim() == 1, "ends: expected 1 dimension, got ", ends.dim());
  const Tensor values = ends.contiguous();
  std::vector<ExpertRows> found;
  int64_t begin = 0;
  for (int64_t e = 0; e < values.size(0); ++e) {
    const int64_t end = values.const_data_ptr<int32_t>()[e];
    TORCH_CHECK(begin <= end && end <= rows, "ends: expected values that rise from 0 to ", rows,
                ", the rows there are, got ", end, " after ", begin, " for expert ", e);
    if (end > begin) found.push_back({e, begin, end});
    begin = end;
  }
  return found;
}

// Zeroes the rows after those of the last expert.
inline void zero_remaining_rows(Tensor& out, const std::vector<ExpertRows>& runs) {
  const int64_t end = runs.empty() ? 0 : runs.back().end;
  if (end < out.size(0)) out.narrow(0, end, out.size(0) - end).zero_();
}

// Activations, (rows, features), contiguous.
inline Tensor expert_activation(const Tensor& t, const char* name) {
  TORCH_CHECK(t.dim() == 2, name, ": expected 2 dimensions, got ", t.dim());
  return activation(t, t.size(1), name);
}

// One bias per expert, or none.
class ExpertBias {
 public:
  ExpertBias(const OptionalTensor& bias, int64_t experts, int64_t features, at::ScalarType dtype) {
    if (!bias) return;
    dtype_ = parameter_dtype(*bias, dtype, "bias");
    check_shape(*bias, {experts, features}, "bias");
    bias_ = bias->contiguous();
  }
  DType dtype() const { return dtype_; }
  const void* of(int64_t expert) const {
    return bias_.defined() ? element_ptr(bias_, expert * bias_.size(1)) : nullptr;
  }
  OptionalTensor tensor_of(int64_t expert) const {
    return bias_.defined() ? OptionalTensor(bias_[expert]) : std::nullopt;
  }

 private:
  Tensor bias_;
  DType dtype_ = DType::kF32;
};

// The frozen weights of all experts, (out, in) each, dense or NF4.
class ExpertWeights {
 public:
  ExpertWeights(const Tensor& weight, const OptionalTensor& absmax, const OptionalTensor& absmax2,
                const OptionalTensor& offset, int64_t layout, int64_t experts, int64_t out_features,
                int64_t in_features, at::ScalarType dtype)
      : in_features_(in_features) {
    if (absmax) {
      nf4_ = std::make_unique<Nf4Weight>(weight, *absmax, absmax2, offset, layout, out_features, in_features,
                                         experts);
      views_.reserve(experts);
      for (int64_t e = 0; e < experts; ++e) views_.push_back(nf4_->view(e));
      return;
    }
    check_dtype(weight, dtype, "weight");
    check_shape(weight, {experts, out_features, in_features}, "weight");
    dense_ = weight;
    if (experts == 0) return;
    one_ = dense_[0];
    few_use_torch_ = uses_torch_gemm(one_, 1);
    many_use_torch_ = uses_torch_gemm(one_, kFewRows + 1);
  }

  bool uses_torch(int64_t rows) const {
    return !nf4_ && (rows > kFewRows ? many_use_torch_ : few_use_torch_);
  }
  // The same for the forward.
  bool uses_torch_forward(int64_t rows) const { return uses_torch(rows) && !has_dense_gemv(one_, rows); }
  Tensor dense(int64_t expert) const { return dense_[expert]; }
  // For an expert that torch does not compute.
  MatrixView matrix(int64_t expert) const {
    if (nf4_) return {nullptr, DType::kF32, in_features_, &views_[expert]};
    return {element_ptr(dense_, expert * dense_.stride(0)), dtype_of(dense_, "weight"), in_features_,
            nullptr};
  }

 private:
  int64_t in_features_;
  std::unique_ptr<Nf4Weight> nf4_;
  std::vector<Nf4View> views_;
  Tensor dense_, one_;  // all experts; the first one
  bool few_use_torch_ = false, many_use_torch_ = false;
};

}  // namespace peft_kernels::cpu
