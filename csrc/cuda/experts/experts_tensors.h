// The weights of layers with many experts.
#pragma once

#include <ATen/ATen.h>

#include <optional>

#include "../../common/nf4_tensors.h"
#include "../core/listed_rows.h"
#include "../nf4/nf4_view.h"
#include "experts.h"

namespace peft_kernels::cuda {

// Contiguous and 16-byte aligned, as kernels require.
inline Tensor aligned(const Tensor& t) {
  const Tensor own = t.contiguous();
  return are_aligned({own.const_data_ptr()}) ? own : own.clone();
}

// The frozen weights of experts, [experts, out_features, in_features]: NF4, or without an absmax dense.
class ExpertsWeight {
 public:
  ExpertsWeight(const Tensor& weight, const OptionalTensor& absmax, const OptionalTensor& absmax2,
                const OptionalTensor& offset, int64_t layout, int64_t experts, int64_t out_features,
                int64_t in_features, at::ScalarType dense_dtype);

  int64_t experts() const { return experts_; }
  int64_t out_features() const { return out_features_; }
  int64_t in_features() const { return in_features_; }
  // Undefined: NF4.
  const Tensor& dense() const { return dense_; }
  // Packed weights:
  ManyNf4 nf4() const;  // of a fused plan
  // The same part of all weights, as bf16 (experts, rows, columns).
  void dequantize(const Part& part, const Tensor& out) const;
  ExpertsPlan plan(const Tensor& rows, bool is_dx) const;

 private:
  int64_t experts_, out_features_, in_features_;
  std::optional<Nf4Tensors> nf4_;
  Tensor dense_;
};

}  // namespace peft_kernels::cuda
