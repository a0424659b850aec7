// Checks the weights of experts, and plans their GEMMs.
#include <ATen/ATen.h>
// Ahead of all others: it is precompiled (tools/precompiled.py).

#include "experts_tensors.h"

namespace peft_kernels::cuda {
namespace {

// Whether torch's grouped GEMM accepts the strides: either matrix dimension may be the contiguous one.
bool has_vectors_of(const Tensor& weight) {
  constexpr int64_t kVector = 8;
  const int64_t rows = weight.stride(1), columns = weight.stride(2);
  const bool by_rows = columns == 1 && rows >= weight.size(2),
             by_columns = rows == 1 && columns >= weight.size(1);
  return are_aligned({weight.const_data_ptr()}) && weight.stride(0) % kVector == 0 &&
         (by_rows ? rows % kVector == 0 : by_columns && columns % kVector == 0);
}

}  // namespace

ExpertsWeight::ExpertsWeight(const Tensor& weight, const OptionalTensor& absmax,
                             const OptionalTensor& absmax2, const OptionalTensor& offset, int64_t layout,
                             int64_t experts, int64_t out_features, int64_t in_features,
                             at::ScalarType dense_dtype)
    : experts_(experts), out_features_(out_features), in_features_(in_features) {
  if (absmax) {
    nf4_.emplace(weight, *absmax, absmax2, offset, layout, out_features, in_features, experts);
  } else {
    check_dtype(weight, dense_dtype, "weight");
    check_shape(weight, {experts, out_features, in_features}, "weight");
    dense_ = weight;
  }
}

ManyNf4 ExpertsWeight::nf4() const {
  const int64_t elements = out_features_ * in_features_;
  const int64_t blocks = ceil_div(elements, int64_t{1} << nf4_->block_shift());
  const int64_t bytes = (elements + 1) / 2;
  const Nf4View first = view_of(*nf4_);
  if (nf4_->has_scale_values())
    return {first, bytes, blocks, 0, nf4_->scale_values(1) - nf4_->scale_values(0)};
  if (nf4_->is_nested()) return {first, bytes, blocks, ceil_div(blocks, nf4::kAbsmaxBlock), 0};
  // Codes are any bytes (view_of): those of the packed weight.
  return {first, bytes, bytes, blocks, 0};
}

void ExpertsWeight::dequantize(const Part& part, const Tensor& out) const {
  if (has_view(*nf4_))
    return dequantize_experts(nf4(), experts_, part, out.mutable_data_ptr(), current_stream());
  for (int64_t e = 0; e < experts_; ++e) {
    dequantize_groups(groups_of(*nf4_, e), part, mutable_element_ptr(out, e * out.stride(0)),
                      dtype_of(out, "out"), out.stride(1), current_stream());
  }
}

ExpertsPlan ExpertsWeight::plan(const Tensor& rows, bool is_dx) const {
  const DType dtype = dtype_of(rows, "rows");
  const Card& card = current_card();
  if (dense_.defined()) {
    if (!has_vectors_of(dense_)) return {};
    return plan_dense_experts(dtype, experts_, rows.size(0), out_features_, in_features_, card);
  }
  if (has_view(*nf4_) && !are_aligned({nf4_->packed()}, 4)) return {};
  if (!has_gemms(*nf4_))
    return plan_dense_experts(dtype, experts_, rows.size(0), out_features_, in_features_, card);
  return plan_experts(is_dx, dtype, experts_, rows.size(0), out_features_, in_features_, nf4_->block_shift(),
                      are_aligned({nf4_->packed()}), card);
}

}  // namespace peft_kernels::cuda
