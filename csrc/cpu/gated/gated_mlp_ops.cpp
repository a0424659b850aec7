// Op gated_mlp: composed of this back end's ops in C++, because composing them in Python costs a decoded
// token more than their kernels.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <tuple>
#include <utility>
#include <vector>

#include "../../common/autocast.h"
#include "../../common/lora_args.h"
#include "../core/op_calls.h"

namespace peft_kernels::cpu {
namespace {

// The list arguments of gated_mlp, per layer: gate, up, down.
struct MlpLayers {
  at::TensorList weight;
  const OptionalTensors &absmax, &absmax2, &offset;
  at::IntArrayRef layout, out_features;
  at::TensorList bias;
};

struct MlpAdapters {
  at::TensorList a, b;
  at::IntArrayRef layer;
  at::ArrayRef<double> scaling, dropout_p;
};

OptionalTensors part_of(const OptionalTensors& list, size_t begin, size_t end) {
  OptionalTensors part;
  part.reserve(end - begin);
  for (size_t j = begin; j < end; ++j) part.push_back(list.get(j));
  return part;
}

// Layers [begin, end) on x, each with its adapters.
std::tuple<std::vector<Tensor>, Tensor> run_layers(const Tensor& x, const MlpLayers& layers,
                                                   const MlpAdapters& adapters, const OptionalTensor& seed,
                                                   int64_t begin, int64_t end) {
  std::vector<Tensor> a, b;
  c10::SmallVector<int64_t, 4> layer;
  c10::SmallVector<double, 4> scaling, dropout_p;
  for (size_t i = 0; i < adapters.layer.size(); ++i) {
    if (adapters.layer[i] < begin || adapters.layer[i] >= end) continue;
    a.push_back(adapters.a[i]);
    b.push_back(adapters.b[i]);
    layer.push_back(adapters.layer[i] - begin);
    scaling.push_back(adapters.scaling[i]);
    dropout_p.push_back(adapters.dropout_p[i]);
  }
  const c10::SmallVector<int64_t, 4> group(layer.size(), 0);
  const int64_t count = end - begin;
  static const auto op = op_of<MultiLoraLinear>("multi_lora_linear");
  return op.call(x, layers.weight.slice(begin, count), part_of(layers.absmax, begin, end),
                 part_of(layers.absmax2, begin, end), part_of(layers.offset, begin, end),
                 layers.layout.slice(begin, count), layers.out_features.slice(begin, count),
                 layers.bias.slice(begin, count), a, b, layer, scaling, dropout_p, seed, group, std::nullopt,
                 std::nullopt);
}

void check_sizes(const MlpLayers& layers, const MlpAdapters& adapters) {
  const auto check = [](size_t expected, const char* like, std::initializer_list<size_t> sizes,
                        const char* names) {
    for (const size_t size : sizes) {
      TORCH_CHECK(size == expected, names, ": expected ", expected, " of each", like, ", got ", size);
    }
  };
  check(3, ", for gate, up and down",
        {layers.weight.size(), layers.absmax.size(), layers.absmax2.size(), layers.offset.size(),
         layers.layout.size(), layers.out_features.size(), layers.bias.size()},
        "weight, absmax, absmax2, offset, layout, out_features, bias");
  check(adapters.a.size(), " like lora_a",
        {adapters.b.size(), adapters.layer.size(), adapters.scaling.size(), adapters.dropout_p.size()},
        "lora_b, layer, scaling, dropout_p");
  for (const int64_t layer : adapters.layer) {
    TORCH_CHECK(0 <= layer && layer < 3, "layer: expected 0 to 2, got ", layer);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> gated_mlp(
    const Tensor& x, at::TensorList weight, const OptionalTensors& absmax, const OptionalTensors& absmax2,
    const OptionalTensors& offset, at::IntArrayRef layout, at::IntArrayRef out_features, at::TensorList bias,
    at::TensorList lora_a, at::TensorList lora_b, at::IntArrayRef layer, at::ArrayRef<double> scaling,
    at::ArrayRef<double> dropout_p, const OptionalTensor& seed, c10::string_view activation) {
  const WithoutAutocast without_autocast;
  const at::AutoDispatchBelowADInplaceOrView below_autograd;
  const MlpLayers layers{weight, absmax, absmax2, offset, layout, out_features, bias};
  const MlpAdapters adapters{lora_a, lora_b, layer, scaling, dropout_p};
  check_sizes(layers, adapters);
  auto [first, h] = run_layers(x, layers, adapters, seed, 0, 2);
  static const auto gated = op_of<GatedActivation>("gated_activation");
  const Tensor hidden = gated.call(first[0], first[1], activation);
  OptionalTensor down_seed;
  if (seed) down_seed = seed->add(1);  // another key: gate and down must not use the same random words
  auto [last, h_down] = run_layers(hidden, layers, adapters, down_seed, 2, 3);
  return {last[0], first[0], first[1], h, h_down};
}

}  // namespace

TORCH_LIBRARY_IMPL(PEFT_KERNELS_NAMESPACE, CPU, m) { m.impl("gated_mlp", gated_mlp); }

}  // namespace peft_kernels::cpu
