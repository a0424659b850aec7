// A decoder layer like Llama's whose operands are collected once, for calls without a gradient. Collecting
// and converting them in Python, for every op of every token, takes longer than the kernels run.
#include <ATen/ATen.h>
#include <torch/custom_class.h>
#include <torch/library.h>

#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../../common/autocast.h"
#include "../core/op_calls.h"

namespace peft_kernels::cpu {
namespace {

// The arguments of multi_lora_linear after x; no dropout.
class AdaptedLayers : public torch::CustomClassHolder {
 public:
  AdaptedLayers(std::vector<Tensor> weight, OptionalTensors absmax, OptionalTensors absmax2,
                OptionalTensors offset, std::vector<int64_t> layout, std::vector<int64_t> out_features,
                std::vector<Tensor> bias, std::vector<Tensor> lora_a, std::vector<Tensor> lora_b,
                std::vector<int64_t> layer, std::vector<double> scaling)
      : weight_(std::move(weight)),
        absmax_(std::move(absmax)),
        absmax2_(std::move(absmax2)),
        offset_(std::move(offset)),
        layout_(std::move(layout)),
        out_features_(std::move(out_features)),
        bias_(std::move(bias)),
        lora_a_(std::move(lora_a)),
        lora_b_(std::move(lora_b)),
        layer_(std::move(layer)),
        scaling_(std::move(scaling)),
        no_dropout_(layer_.size(), 0.0),
        no_group_(layer_.size(), 0) {}

  std::vector<Tensor> run(const Tensor& x) const {
    static const auto op = op_of<MultiLoraLinear>("multi_lora_linear");
    return std::get<0>(op.call(x, weight_, absmax_, absmax2_, offset_, layout_, out_features_, bias_, lora_a_,
                               lora_b_, layer_, scaling_, no_dropout_, std::nullopt, no_group_, std::nullopt,
                               std::nullopt));
  }

 private:
  std::vector<Tensor> weight_;
  OptionalTensors absmax_, absmax2_, offset_;
  std::vector<int64_t> layout_, out_features_;
  std::vector<Tensor> bias_, lora_a_, lora_b_;
  std::vector<int64_t> layer_;
  std::vector<double> scaling_, no_dropout_;
  std::vector<int64_t> no_group_;
};

// The operands of rms_norm after x. The result has x's dtype.
struct Norm {
  Tensor weight;
  double eps, offset;
  bool rounds;

  Tensor run(const Tensor& x) const {
    static const auto op = op_of<RmsNorm>("rms_norm");
    return std::get<0>(op.call(x, weight, eps, offset, rounds, x.scalar_type()));
  }
};

using Layers = c10::intrusive_ptr<AdaptedLayers>;

class DecoderLayer : public torch::CustomClassHolder {
 public:
  // norms: weights of the norms before attention and before the MLP, and if given of the norms of the heads
  // of queries and keys; eps, offset and rounds of each.
  DecoderLayer(const std::vector<Tensor>& norms, const std::vector<double>& eps,
               const std::vector<double>& offset, const std::vector<int64_t>& rounds, Layers qkv,
               Layers output, Layers gate_up, Layers down, int64_t head_features, bool rotates,
               std::string activation)
      : qkv_(std::move(qkv)),
        output_(std::move(output)),
        gate_up_(std::move(gate_up)),
        down_(std::move(down)),
        head_features_(head_features),
        rotates_(rotates),
        activation_(std::move(activation)) {
    TORCH_CHECK(norms.size() == 2 || norms.size() == 4, "norms: expected 2 or 4, got ", norms.size());
    for (size_t i = 0; i < norms.size(); ++i) {
      norms_.push_back({norms[i], eps.at(i), offset.at(i), rounds.at(i) != 0});
    }
  }

  // Queries, keys and values of x (batch, rows, features), each (batch, heads, rows, head_features).
  std::tuple<Tensor, Tensor, Tensor> project(const Tensor& x, const Tensor& cos, const Tensor& sin) const {
    const WithoutAutocast without_autocast;
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    std::vector<Tensor> heads = qkv_->run(norms_[0].run(x));
    for (Tensor& t : heads) t = t.view({x.size(0), x.size(1), -1, head_features_});
    Tensor v = std::move(heads[2]);
    heads.pop_back();
    if (norms_.size() == 4) {
      for (size_t i = 0; i < 2; ++i) heads[i] = norms_[2 + i].run(heads[i]);
    }
    if (rotates_) {
      static const auto rotary = op_of<Rotary>("rotary");
      heads = rotary.call(heads, cos, sin, false, at::promote_types(x.scalar_type(), cos.scalar_type()));
    }
    return {heads[0].transpose(1, 2), heads[1].transpose(1, 2), v.transpose(1, 2)};
  }

  // The layer's output, given its input x and what attention returned (batch, rows, heads, head_features).
  Tensor finish(const Tensor& attended, const Tensor& x) const {
    const WithoutAutocast without_autocast;
    const at::AutoDispatchBelowADInplaceOrView below_autograd;
    const Tensor y = output_->run(attended.reshape({x.size(0), x.size(1), -1}))[0];
    static const auto add_norm = op_of<AddRmsNorm>("add_rms_norm");
    const Norm& norm = norms_[1];
    const auto [normed, sum, rstd] =
        add_norm.call(y, x, norm.weight, norm.eps, norm.offset, norm.rounds, x.scalar_type());
    const std::vector<Tensor> gate_up = gate_up_->run(normed);
    static const auto gated = op_of<GatedActivation>("gated_activation");
    return sum + down_->run(gated.call(gate_up[0], gate_up[1], activation_))[0];
  }

 private:
  std::vector<Norm> norms_;
  Layers qkv_, output_, gate_up_, down_;
  int64_t head_features_;
  bool rotates_;
  std::string activation_;
};

}  // namespace

TORCH_LIBRARY_FRAGMENT(PEFT_KERNELS_JOIN(PEFT_KERNELS_NAMESPACE, _library), m) {
  m.class_<AdaptedLayers>("AdaptedLayers")
      .def(torch::init<std::vector<Tensor>, OptionalTensors, OptionalTensors, OptionalTensors,
                       std::vector<int64_t>, std::vector<int64_t>, std::vector<Tensor>, std::vector<Tensor>,
                       std::vector<Tensor>, std::vector<int64_t>, std::vector<double>>());
  m.class_<DecoderLayer>("DecoderLayer")
      .def(torch::init<std::vector<Tensor>, std::vector<double>, std::vector<double>, std::vector<int64_t>,
                       Layers, Layers, Layers, Layers, int64_t, bool, std::string>())
      .def("project", &DecoderLayer::project)
      .def("finish", &DecoderLayer::finish);
}

}  // namespace peft_kernels::cpu
