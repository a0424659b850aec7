// The LoRA ops, once for all back ends: converts their arguments to the general case, layers that share x,
// each with any number of adapters.
#pragma once

#include <torch/library.h>

#include <tuple>
#include <utility>
#include <vector>

#include "lora_args.h"

namespace peft_kernels {

struct LoraForward {
  std::vector<Tensor> y;  // per layer; same leading sizes as x, as has h
  Tensor h;
};

struct LoraGradients {
  Tensor dx;  // of x's sizes
  std::vector<Tensor> da, db;
};

// `Layers` is the back end's implementation, one object per call:
//   using Base = BaseWeightOf<..>;
//   Layers(x, std::vector<AdapterArgs>, seed, row_group, at::ScalarType of the base GEMMs)
//   LoraForward forward(const std::vector<Base>&, const std::vector<OptionalTensor>& bias)
//   LoraGradients backward(const std::vector<Tensor>& dy, const Tensor& h, const std::vector<Base>&,
//                          bool need_dx, need_da, need_db), dy by layer and as rows
template <class Layers>
struct LoraOps {
  using Base = typename Layers::Base;

  static std::tuple<Tensor, Tensor> lora_linear(const Tensor& x, const Tensor& weight,
                                                const OptionalTensor& absmax, const OptionalTensor& absmax2,
                                                const OptionalTensor& offset, int64_t layout,
                                                const OptionalTensor& bias, const Tensor& lora_a,
                                                const Tensor& lora_b, double scaling, double dropout_p,
                                                const OptionalTensor& seed,
                                                const OptionalDtype& compute_dtype) {
    const at::ScalarType compute = compute_type(compute_dtype, x);
    Layers layers(x, one_adapter(x, lora_a, lora_b, scaling, dropout_p, seed), seed, std::nullopt, compute);
    std::vector<Base> bases;
    bases.emplace_back(weight, absmax, absmax2, offset, layout, lora_b.size(0), lora_a.size(1), compute);
    LoraForward out = layers.forward(bases, {bias});
    return {out.y[0], out.h};
  }

  static std::tuple<Tensor, Tensor, Tensor> lora_linear_backward(
      const Tensor& dy, const Tensor& x, const Tensor& h, const Tensor& weight, const OptionalTensor& absmax,
      const OptionalTensor& absmax2, const OptionalTensor& offset, int64_t layout, const Tensor& lora_a,
      const Tensor& lora_b, double scaling, double dropout_p, const OptionalTensor& seed,
      const OptionalDtype& compute_dtype, bool need_dx, bool need_da, bool need_db) {
    const at::ScalarType compute = compute_type(compute_dtype, x);
    Layers layers(x, one_adapter(x, lora_a, lora_b, scaling, dropout_p, seed), seed, std::nullopt, compute);
    check_shape(dy, sizes_with_last(x, lora_b.size(0)), "dy");
    std::vector<Base> bases;
    bases.emplace_back(weight, absmax, absmax2, offset, layout, lora_b.size(0), lora_a.size(1), compute);
    LoraGradients out = layers.backward({gradient_rows(dy, x)}, h_rows(h, x, lora_a.size(0)), bases, need_dx,
                                        {need_da}, {need_db});
    return {out.dx, out.da[0], out.db[0]};
  }

  static std::tuple<std::vector<Tensor>, Tensor> multi_lora_linear(
      const Tensor& x, at::TensorList weight, const OptionalTensors& absmax, const OptionalTensors& absmax2,
      const OptionalTensors& offset, at::IntArrayRef layout, at::IntArrayRef out_features,
      at::TensorList bias, at::TensorList lora_a, at::TensorList lora_b, at::IntArrayRef layer,
      at::ArrayRef<double> scaling, at::ArrayRef<double> dropout_p, const OptionalTensor& seed,
      at::IntArrayRef group, const OptionalTensor& row_group, const OptionalDtype& compute_dtype) {
    const at::ScalarType compute = compute_type(compute_dtype, x);
    Layers layers(
        x, all_adapters(x, lora_a, lora_b, layer, scaling, dropout_p, seed, group, row_group, weight.size()),
        seed, row_group, compute);
    const std::vector<Base> bases =
        all_bases<Base>(x, weight, absmax, absmax2, offset, layout, out_features, compute);
    TORCH_CHECK(bias.size() == bases.size(), "bias: expected ", bases.size(), " like weight, got ",
                bias.size());
    std::vector<OptionalTensor> biases;  // a tensor without elements means no bias
    for (const Tensor& b : bias) biases.push_back(b.numel() ? OptionalTensor(b) : std::nullopt);
    LoraForward out = layers.forward(bases, biases);
    return {std::move(out.y), out.h};
  }

  static std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> multi_lora_linear_backward(
      at::TensorList dy, const Tensor& x, const Tensor& h, at::TensorList weight,
      const OptionalTensors& absmax, const OptionalTensors& absmax2, const OptionalTensors& offset,
      at::IntArrayRef layout, at::TensorList lora_a, at::TensorList lora_b, at::IntArrayRef layer,
      at::ArrayRef<double> scaling, at::ArrayRef<double> dropout_p, const OptionalTensor& seed,
      at::IntArrayRef group, const OptionalTensor& row_group, const OptionalDtype& compute_dtype,
      bool need_dx, const c10::List<bool>& need_da, const c10::List<bool>& need_db) {
    const at::ScalarType compute = compute_type(compute_dtype, x);
    TORCH_CHECK(dy.size() == weight.size(), "dy: expected ", weight.size(), " like weight, got ", dy.size());
    TORCH_CHECK(need_da.size() == lora_a.size() && need_db.size() == lora_a.size(),
                "need_da, need_db: expected ", lora_a.size(), " of each like lora_a, got ", need_da.size(),
                ", ", need_db.size());
    std::vector<AdapterArgs> adapters =
        all_adapters(x, lora_a, lora_b, layer, scaling, dropout_p, seed, group, row_group, weight.size());
    const int64_t ranks = ranks_of(adapters);
    Layers layers(x, std::move(adapters), seed, row_group, compute);
    std::vector<int64_t> out_features;
    std::vector<Tensor> dy_rows;
    for (const Tensor& d : dy) {
      dy_rows.push_back(gradient_rows(d, x));
      out_features.push_back(d.size(-1));
    }
    const std::vector<Base> bases =
        all_bases<Base>(x, weight, absmax, absmax2, offset, layout, out_features, compute);
    LoraGradients out = layers.backward(dy_rows, h_rows(h, x, ranks), bases, need_dx,
                                        {need_da.begin(), need_da.end()}, {need_db.begin(), need_db.end()});
    return {out.dx, std::move(out.da), std::move(out.db)};
  }

  static void implement(torch::Library& library) {
    library.impl("lora_linear", lora_linear);
    library.impl("lora_linear_backward", lora_linear_backward);
    library.impl("multi_lora_linear", multi_lora_linear);
    library.impl("multi_lora_linear_backward", multi_lora_linear_backward);
  }
};

}  // namespace peft_kernels
