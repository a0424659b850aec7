// The ops with LoRA adapters: tensors to pointers, and registration. Schemas live in peft_kernels/ops/.
//
// All of them are one thing here: linear layers that share x, each with any number of adapters. Which rows an
// adapter serves is known on the device alone.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "linear_product.h"
#include "lora_adapters.h"

namespace peft_kernels::cuda {
namespace {

struct Gradients {
  Tensor dx;
  std::vector<Tensor> da, db;
};

// Of one layer: x W^T + bias + the deltas of its adapters, given x in the type of the base product too.
Tensor layer_forward(const Tensor& x, const Tensor& rounded, const BaseWeight& base,
                     const OptionalTensor& bias, size_t layer, const Adapters& adapters, const Tensor& h) {
  adapters.check_out_features(layer, base.out_features());
  const at::ScalarType compute = rounded.scalar_type();
  const BaseProduct product = BaseProduct::forward(rounded, base);
  if (compute == x.scalar_type() && product.takes_slab()) {
    const SlabTensor slab = adapters.slab(base, layer, false, h);
    if (slab.view.depth != 0) return product.run(bias, slab.view);
  }
  OptionalTensor base_bias = bias;
  if (bias && bias->scalar_type() != compute) {
    check_bias(*bias, base.out_features(), x.scalar_type());
    base_bias = bias->to(at::kFloat);
  }
  const Tensor y = product.run(base_bias).to(x.scalar_type());
  adapters.add_deltas(y, layer, h);
  return y;
}

Tensor input_gradient(const std::vector<Tensor>& dy, const Tensor& x, const std::vector<BaseWeight>& bases,
                      const Adapters& adapters, const Tensor& dh, at::ScalarType compute) {
  std::vector<Tensor> terms;
  for (size_t j = 0; j < bases.size(); ++j) {
    const Tensor rounded = dy[j].to(compute);
    const BaseProduct product = BaseProduct::backward(rounded, bases[j]);
    if (compute == x.scalar_type() && bases.size() == 1 && product.takes_slab()) {
      const SlabTensor slab = adapters.slab(bases[0], 0, true, dh);
      if (slab.view.depth != 0) return product.run(std::nullopt, slab.view);
    }
    terms.push_back(product.run().to(x.scalar_type()));
  }
  return adapters.dx(terms, x, dh);
}

Gradients backward(const std::vector<Tensor>& dy, const Tensor& x, const Tensor& h,
                   const std::vector<BaseWeight>& bases, const Adapters& adapters, at::ScalarType compute,
                   bool need_dx, const std::vector<bool>& need_da, const std::vector<bool>& need_db) {
  for (size_t j = 0; j < dy.size(); ++j) adapters.check_out_features(j, dy[j].size(1));
  bool need_dh = need_dx;
  for (const bool need : need_da) need_dh |= need;
  const Tensor dh = need_dh ? adapters.dh(dy) : Tensor();
  return {need_dx ? input_gradient(dy, x, bases, adapters, dh, compute) : at::empty({0}, x.options()),
          adapters.da(dh, x, need_da), adapters.db(dy, h, need_db)};
}

std::tuple<Tensor, Tensor> lora_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& absmax,
                                       const OptionalTensor& absmax2, const OptionalTensor& offset,
                                       int64_t blocksize, const OptionalTensor& bias, const Tensor& lora_a,
                                       const Tensor& lora_b, double scaling, double dropout_p,
                                       const OptionalTensor& seed, const OptionalDtype& compute_dtype) {
  const OnDeviceOf device(x, "x");
  const at::ScalarType compute = compute_type(compute_dtype, x);
  const auto adapters =
      adapters_for(x, {one_adapter_args(x, lora_a, lora_b, scaling, dropout_p, seed)}, seed, std::nullopt);
  const Adapter& adapter = adapters->list()[0];
  const Tensor rows = as_rows(x, adapter.a.size(1), "x");
  const BaseWeight base(weight, absmax, absmax2, offset, blocksize, adapter.b.size(0), adapter.a.size(1),
                        compute);
  const Tensor h = adapters->h(rows);
  const Tensor y = layer_forward(rows, rows.to(compute), base, bias, 0, *adapters, h);
  return {reshaped(y, sizes_with_last(x, base.out_features())),
          reshaped(h, sizes_with_last(x, adapter.rank()))};
}

std::tuple<Tensor, Tensor, Tensor> lora_linear_backward(
    const Tensor& dy, const Tensor& x, const Tensor& h, const Tensor& weight, const OptionalTensor& absmax,
    const OptionalTensor& absmax2, const OptionalTensor& offset, int64_t blocksize, const Tensor& lora_a,
    const Tensor& lora_b, double scaling, double dropout_p, const OptionalTensor& seed,
    const OptionalDtype& compute_dtype, bool need_dx, bool need_da, bool need_db) {
  const OnDeviceOf device(dy, "dy");
  const at::ScalarType compute = compute_type(compute_dtype, x);
  const auto adapters =
      adapters_for(x, {one_adapter_args(x, lora_a, lora_b, scaling, dropout_p, seed)}, seed, std::nullopt);
  const Adapter& adapter = adapters->list()[0];
  check_shape(dy, sizes_with_last(x, adapter.b.size(0)), "dy");
  std::vector<BaseWeight> bases;
  bases.emplace_back(weight, absmax, absmax2, offset, blocksize, adapter.b.size(0), adapter.a.size(1),
                     compute);
  const Gradients g =
      backward({gradient_rows(dy, x)}, as_rows(x, adapter.a.size(1), "x"), h_rows(h, x, adapter.rank()),
               bases, *adapters, compute, need_dx, {need_da}, {need_db});
  return {need_dx ? reshaped(g.dx, x.sizes()) : g.dx, g.da[0], g.db[0]};
}

std::tuple<std::vector<Tensor>, Tensor> multi_lora_linear(
    const Tensor& x, at::TensorList weight, const OptionalTensors& absmax, const OptionalTensors& absmax2,
    const OptionalTensors& offset, at::IntArrayRef blocksize, at::IntArrayRef out_features,
    at::TensorList bias, at::TensorList lora_a, at::TensorList lora_b, at::IntArrayRef layer,
    at::ArrayRef<double> scaling, at::ArrayRef<double> dropout_p, const OptionalTensor& seed,
    at::IntArrayRef group, const OptionalTensor& row_group, const OptionalDtype& compute_dtype) {
  const OnDeviceOf device(x, "x");
  const at::ScalarType compute = compute_type(compute_dtype, x);
  const auto adapters = adapters_for(
      x,
      all_adapter_args(x, lora_a, lora_b, layer, scaling, dropout_p, seed, group, row_group, weight.size()),
      seed, row_group);
  const std::vector<BaseWeight> bases =
      all_bases<BaseWeight>(x, weight, absmax, absmax2, offset, blocksize, out_features, compute);
  TORCH_CHECK(bias.size() == bases.size(), "bias: expected ", bases.size(), " like weight, got ",
              bias.size());
  const Tensor rows = as_rows(x, x.size(-1), "x");
  const Tensor rounded = rows.to(compute);
  const Tensor h = adapters->h(rows);
  std::vector<Tensor> y;
  for (size_t j = 0; j < bases.size(); ++j) {
    const Tensor out = layer_forward(rows, rounded, bases[j], optional_bias(bias[j]), j, *adapters, h);
    y.push_back(reshaped(out, sizes_with_last(x, bases[j].out_features())));
  }
  return {y, reshaped(h, sizes_with_last(x, h.size(1)))};
}

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> multi_lora_linear_backward(
    at::TensorList dy, const Tensor& x, const Tensor& h, at::TensorList weight, const OptionalTensors& absmax,
    const OptionalTensors& absmax2, const OptionalTensors& offset, at::IntArrayRef blocksize,
    at::TensorList lora_a, at::TensorList lora_b, at::IntArrayRef layer, at::ArrayRef<double> scaling,
    at::ArrayRef<double> dropout_p, const OptionalTensor& seed, at::IntArrayRef group,
    const OptionalTensor& row_group, const OptionalDtype& compute_dtype, bool need_dx,
    const c10::List<bool>& need_da, const c10::List<bool>& need_db) {
  const OnDeviceOf device(x, "x");
  const at::ScalarType compute = compute_type(compute_dtype, x);
  TORCH_CHECK(dy.size() == weight.size(), "dy: expected ", weight.size(), " like weight, got ", dy.size());
  TORCH_CHECK(need_da.size() == lora_a.size() && need_db.size() == lora_a.size(),
              "need_da, need_db: expected ", lora_a.size(), " of each like lora_a, got ", need_da.size(),
              ", ", need_db.size());
  const auto adapters = adapters_for(
      x,
      all_adapter_args(x, lora_a, lora_b, layer, scaling, dropout_p, seed, group, row_group, weight.size()),
      seed, row_group);
  std::vector<int64_t> out_features;
  std::vector<Tensor> dy_rows;
  for (const Tensor& d : dy) {
    dy_rows.push_back(gradient_rows(d, x));
    out_features.push_back(d.size(-1));
  }
  const std::vector<BaseWeight> bases =
      all_bases<BaseWeight>(x, weight, absmax, absmax2, offset, blocksize, out_features, compute);
  const Gradients g =
      backward(dy_rows, as_rows(x, x.size(-1), "x"), h_rows(h, x, adapters->ranks()), bases, *adapters,
               compute, need_dx, {need_da.begin(), need_da.end()}, {need_db.begin(), need_db.end()});
  return {need_dx ? reshaped(g.dx, x.sizes()) : g.dx, g.da, g.db};
}

}  // namespace

TORCH_LIBRARY_IMPL(PEFT_KERNELS_NAMESPACE, PEFT_KERNELS_DISPATCH_KEY, m) {
  m.impl("lora_linear", lora_linear);
  m.impl("lora_linear_backward", lora_linear_backward);
  m.impl("multi_lora_linear", multi_lora_linear);
  m.impl("multi_lora_linear_backward", multi_lora_linear_backward);
}

}  // namespace peft_kernels::cuda
