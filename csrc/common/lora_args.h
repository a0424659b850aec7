// Checked arguments of the LoRA ops: layers that share x, each with any number of adapters.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>
#include <vector>

#include "checks.h"

namespace peft_kernels {

using OptionalTensors = c10::List<std::optional<Tensor>>;
using OptionalDtype = std::optional<at::ScalarType>;

// The base GEMM's dtype: x's own unless another is requested.
inline at::ScalarType compute_type(const OptionalDtype& compute_dtype, const Tensor& x) {
  if (!compute_dtype) return x.scalar_type();
  TORCH_CHECK(*compute_dtype == at::kFloat || *compute_dtype == at::kBFloat16 || *compute_dtype == at::kHalf,
              "compute_dtype: expected float32, bfloat16 or float16, got ", *compute_dtype);
  return *compute_dtype;
}

// The dtype other than fp32 that check_bias() allows: a layer's bias may have x's dtype or the base GEMM's.
inline at::ScalarType bias_type(const OptionalTensor& bias, at::ScalarType compute, const Tensor& x) {
  return bias && bias->scalar_type() == compute ? compute : x.scalar_type();
}

// As dropout_threshold and dropout_scale in peft_kernels/ops/lora/dropout.py.
struct Dropout {
  uint32_t stream;
  uint32_t threshold;  // of a word that keeps its element; 0: keeps all
  float scale;         // factor of the elements kept
};

inline Dropout dropout_of(double p, const OptionalTensor& seed, uint32_t stream) {
  TORCH_CHECK(0.0 <= p && p <= 1.0, "dropout_p: expected 0 to 1, got ", p);
  if (p == 0.0) return {stream, 0, 1.0f};
  TORCH_CHECK(seed.has_value(), "seed: expected an int64 tensor of one element with dropout_p ", p,
              ", got none");
  check_dtype(*seed, at::kLong, "seed");
  check_numel(*seed, 1, "seed");
  const double threshold = std::min(std::nearbyint(p * 0x1p32), 0x1p32 - 1);
  return {stream, static_cast<uint32_t>(threshold), p < 1.0 ? static_cast<float>(1.0 / (1.0 - p)) : 0.0f};
}

// The frozen weight of one layer, dense or NF4. Nf4 is constructed like Nf4Tensors.
template <class Nf4>
class BaseWeightOf {
 public:
  BaseWeightOf(const Tensor& weight, const OptionalTensor& absmax, const OptionalTensor& absmax2,
               const OptionalTensor& offset, int64_t layout, int64_t out_features, int64_t in_features,
               at::ScalarType compute_dtype)
      : out_features_(out_features), in_features_(in_features) {
    if (absmax) {
      nf4_ = std::make_unique<Nf4>(weight, *absmax, absmax2, offset, layout, out_features, in_features);
    } else {
      check_dtype(weight, compute_dtype, "weight");
      check_shape(weight, {out_features, in_features}, "weight");
      dense_ = weight;  // GPT-2's is transposed: torch's GEMMs take it as it is, a copy would cost as much
    }
  }
  bool is_dense() const { return !nf4_; }
  const Tensor& dense() const { return dense_; }
  const Nf4& nf4() const { return *nf4_; }
  int64_t out_features() const { return out_features_; }
  int64_t in_features() const { return in_features_; }

 private:
  int64_t out_features_, in_features_;
  std::unique_ptr<Nf4> nf4_;
  Tensor dense_;
};

struct AdapterArgs {
  Tensor a;  // [r, in_features]
  Tensor b;  // [out_features, r]
  size_t layer;
  float scaling;
  Dropout dropout;
  int64_t group;    // of the rows that it serves
  int64_t h_begin;  // its columns in h

  AdapterArgs(const Tensor& lora_a, const Tensor& lora_b, int64_t in_features,
              at::ScalarType activation_dtype, size_t layer, double scaling, const Dropout& dropout,
              int64_t group, int64_t h_begin)
      : layer(layer), scaling(static_cast<float>(scaling)), dropout(dropout), group(group), h_begin(h_begin) {
    check(lora_a, activation_dtype, "lora_a");
    check(lora_b, activation_dtype, "lora_b");
    check_shape(lora_a, {lora_a.size(0), in_features}, "lora_a");
    check_shape(lora_b, {lora_b.size(0), lora_a.size(0)}, "lora_b");
    a = lora_a.contiguous();
    b = lora_b.contiguous();
  }
  int64_t rank() const { return a.size(0); }
  int64_t h_end() const { return h_begin + rank(); }
  bool drops() const { return dropout.threshold != 0; }
  void check_out_features(int64_t out_features) const { check_shape(b, {out_features, rank()}, "lora_b"); }

 private:
  static void check(const Tensor& t, at::ScalarType activation_dtype, const char* name) {
    parameter_dtype(t, activation_dtype, name);
    TORCH_CHECK(t.dim() == 2, name, ": expected 2 dimensions, got ", t.dim());
  }
};

// The adapters of experts: [experts, r, in_features] and [experts, out_features, r].
inline void check_experts_adapters(const Tensor& a, const Tensor& b, const Tensor& x, int64_t experts) {
  for (const auto& [t, name] : {std::pair{&a, "lora_a"}, {&b, "lora_b"}}) {
    parameter_dtype(*t, x.scalar_type(), name);
    TORCH_CHECK(t->dim() == 3, name, ": expected 3 dimensions, got ", t->dim());
  }
  check_shape(a, {experts, a.size(1), x.size(1)}, "lora_a");
  check_shape(b, {experts, b.size(1), a.size(1)}, "lora_b");
}

// Columns of h.
template <class Adapters>
int64_t ranks_of(const Adapters& adapters) {
  return adapters.empty() ? 0 : adapters.back().h_end();
}

// One layer, one adapter.
inline std::vector<AdapterArgs> one_adapter(const Tensor& x, const Tensor& lora_a, const Tensor& lora_b,
                                            double scaling, double dropout_p, const OptionalTensor& seed) {
  TORCH_CHECK(x.dim() >= 1, "x: expected at least 1 dimension, got 0");
  const int64_t in_features = lora_a.dim() == 2 ? lora_a.size(1) : x.size(-1);
  std::vector<AdapterArgs> adapters;
  adapters.emplace_back(lora_a, lora_b, in_features, x.scalar_type(), 0, scaling,
                        dropout_of(dropout_p, seed, 0), 0, 0);
  TORCH_CHECK(x.size(-1) == in_features, "x: expected ", in_features, " features, got ", x.size(-1));
  return adapters;
}

inline std::vector<AdapterArgs> all_adapters(const Tensor& x, at::TensorList lora_a, at::TensorList lora_b,
                                             at::IntArrayRef layer, at::ArrayRef<double> scaling,
                                             at::ArrayRef<double> dropout_p, const OptionalTensor& seed,
                                             at::IntArrayRef group, const OptionalTensor& row_group,
                                             size_t layers) {
  const size_t count = lora_a.size();
  TORCH_CHECK(lora_b.size() == count && layer.size() == count && scaling.size() == count &&
                  dropout_p.size() == count && group.size() == count,
              "lora_b, layer, scaling, dropout_p, group: expected ", count, " of each like lora_a, got ",
              lora_b.size(), ", ", layer.size(), ", ", scaling.size(), ", ", dropout_p.size(), ", ",
              group.size());
  TORCH_CHECK(x.dim() >= 1, "x: expected at least 1 dimension, got 0");
  if (row_group) {
    check_dtype(*row_group, at::kLong, "row_group");
    check_shape(*row_group, {rows_of(x)}, "row_group");
  }
  std::vector<AdapterArgs> adapters;
  adapters.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    TORCH_CHECK(0 <= layer[i] && static_cast<size_t>(layer[i]) < layers, "layer: expected 0 to ", layers - 1,
                ", got ", layer[i]);
    adapters.emplace_back(lora_a[i], lora_b[i], x.size(-1), x.scalar_type(), static_cast<size_t>(layer[i]),
                          scaling[i], dropout_of(dropout_p[i], seed, static_cast<uint32_t>(i)), group[i],
                          ranks_of(adapters));
  }
  return adapters;
}

template <class BaseWeight>
std::vector<BaseWeight> all_bases(const Tensor& x, at::TensorList weight, const OptionalTensors& absmax,
                                  const OptionalTensors& absmax2, const OptionalTensors& offset,
                                  at::IntArrayRef layout, at::IntArrayRef out_features,
                                  at::ScalarType compute_dtype) {
  const size_t count = weight.size();
  TORCH_CHECK(absmax.size() == count && absmax2.size() == count && offset.size() == count &&
                  layout.size() == count && out_features.size() == count,
              "absmax, absmax2, offset, layout, out_features: expected ", count, " of each like weight, got ",
              absmax.size(), ", ", absmax2.size(), ", ", offset.size(), ", ", layout.size(), ", ",
              out_features.size());
  std::vector<BaseWeight> bases;
  bases.reserve(count);
  for (size_t j = 0; j < count; ++j) {
    bases.emplace_back(weight[j], absmax.get(j), absmax2.get(j), offset.get(j), layout[j], out_features[j],
                       x.size(-1), compute_dtype);
  }
  return bases;
}

// The gradient of a layer's output as rows; `out_features` of them a row.
inline Tensor gradient_rows(const Tensor& dy, const Tensor& x) {
  check_dtype(dy, x.scalar_type(), "dy");
  TORCH_CHECK(dy.dim() == x.dim(), "dy: expected ", x.dim(), " dimensions like x, got ", dy.dim());
  check_shape(dy, sizes_with_last(x, dy.size(-1)), "dy");
  return as_rows(dy, dy.size(-1), "dy");
}

// h as rows.
inline Tensor h_rows(const Tensor& h, const Tensor& x, int64_t ranks) {
  check_dtype(h, at::kFloat, "h");
  check_shape(h, sizes_with_last(x, ranks), "h");
  return as_rows(h, ranks, "h");
}

}  // namespace peft_kernels
