// The backward of a trained head: recomputes logits tile by tile, and their gradients.
#pragma once

#include <utility>

#include "cross_entropy_head.h"

namespace peft_kernels::cpu {

// For rows that all have a label.
class LogitGradients {
 public:
  LogitGradients(Tensor x, const Tensor& h, const Tensor& lora_b, const Head& head, const Tensor& bias,
                 LogitGradientParams params)
      : rows_(std::move(x)),
        x_(rows_.tensor()),
        h_(h),
        lora_b_(lora_b),
        head_(head),
        bias_(bias),
        uses_torch_(head.uses_torch(x_.size(0))),
        is_float_(x_.scalar_type() == at::kFloat),
        params_(params) {
    const auto cols = std::min(head.tile_cols(), params.vocabulary);
    gradients_ = at::empty({x_.size(0), cols}, x_.options().dtype(at::kFloat));
    if (!is_float_) rounded_ = at::empty({x_.size(0), cols}, x_.options());
  }

  // Calls use(first, last, gradients, rounded) for each tile of columns: the gradients in fp32, and rounded
  // to x's dtype.
  template <class Use>
  void each(const Use& use) {
    const int64_t step = gradients_.size(1);
    for (int64_t first = 0; first < params_.vocabulary; first += step) {
      const int64_t last = std::min(first + step, params_.vocabulary);
      if (last - first < step) {  // tiles are contiguous
        gradients_ = at::empty({x_.size(0), last - first}, gradients_.options());
        if (!is_float_) rounded_ = at::empty({x_.size(0), last - first}, x_.options());
      }
      fill(first, last);
      use(first, last, gradients_, is_float_ ? gradients_ : rounded_);
    }
  }
  // sums += rounded @ rows [first, ..) of the head.
  void add_back(const Tensor& rounded, int64_t first, Tensor& sums) const {
    if (uses_torch_) {
      is_float_ ? sums.addmm_(rounded, weight_) : sums.add_(at::mm(rounded, weight_));
      return;
    }
    Nf4View view{};
    Gemm gemm(sums);
    gemm.accumulate();
    gemm.add(term_of(rounded, "gradients", rows_from(first, view)));
    gemm.run_nn();
  }

 private:
  MatrixView rows_from(int64_t first, Nf4View& view) const {
    return head_.rounds() ? dense_matrix(weight_, "weight") : head_.rows_from(first, view);
  }

  void fill(int64_t first, int64_t last) {
    if (uses_torch_ || head_.rounds()) weight_ = head_.dense(first, last);
    if (uses_torch_) {
      gradients_.copy_(at::mm(x_, weight_.t()));
    } else {
      Nf4View view{};
      Gemm gemm(gradients_);
      gemm.add(term_of(x_, "x", rows_from(first, view)));
      gemm.run_nt(rows_);
    }
    if (h_.defined()) gradients_.addmm_(h_, lora_b_.slice(0, first, last).t());
    LogitGradientParams p = params_;
    p.logits = gradients_.mutable_data_ptr<float>();
    p.rounded = is_float_ ? nullptr : rounded_.mutable_data_ptr();
    p.dtype = dtype_of(x_, "x");
    p.first_col = first;
    p.cols = last - first;
    p.bias = bias_.defined() ? bias_.const_data_ptr<float>() + first : nullptr;
    const auto logit_gradients = kernels().logit_gradients;
    parallel_for(0, x_.size(0), ceil_div(kElementwiseGrain / 4, p.cols),
                 [&](int64_t begin, int64_t end) { logit_gradients(p, begin, end); });
  }

  const Rows rows_;
  const Tensor& x_;
  const Tensor &h_, &lora_b_;
  const Head& head_;
  const Tensor& bias_;
  const bool uses_torch_, is_float_;
  const LogitGradientParams params_;
  Tensor gradients_, rounded_;
  Tensor weight_;  // of the tile, unless the head is used in place
};

}  // namespace peft_kernels::cpu
