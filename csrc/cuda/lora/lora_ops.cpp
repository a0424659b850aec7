// The CUDA side of the LoRA ops. Which rows an adapter serves is known on the device alone.
#include <ATen/ATen.h>
// Ahead of all others: it is precompiled (tools/precompiled.py).

#include <memory>
#include <vector>

#include "../../common/lora_ops.h"
#include "../linear/linear_gemm.h"
#include "lora_adapters.h"

namespace peft_kernels::cuda {
namespace {

// Avoids a call of torch's dispatcher if the dtype is right.
Tensor in_type(const Tensor& t, at::ScalarType type) { return t.scalar_type() == type ? t : t.to(type); }

// One layer: x W^T + bias + the deltas of its adapters. `rounded` is x in the compute dtype of the base GEMM.
Tensor layer_forward(const Tensor& x, const Tensor& rounded, const BaseWeight& base,
                     const OptionalTensor& bias, size_t layer, const Adapters& adapters, const Tensor& h) {
  adapters.check_out_features(layer, base.out_features());
  const at::ScalarType compute = rounded.scalar_type();
  const BaseGemm gemm = BaseGemm::forward(rounded, base);
  if (compute == x.scalar_type() && gemm.takes_slab()) {
    const SlabTensor slab = adapters.slab(base, layer, false, h);
    if (slab.view.depth != 0) return gemm.run(bias, slab.view);
  }
  // The GEMM adds to the deltas in its epilogue: y is read once less than if they were added to y.
  if (compute == x.scalar_type() && !gemm.takes_slab() && !bias) {
    const Tensor y = adapters.deltas(x, layer, base.out_features(), h);
    if (y.defined()) {
      gemm.add_to(y);
      return y;
    }
  }
  OptionalTensor base_bias = bias;
  if (bias && bias->scalar_type() != compute) {
    check_bias(*bias, base.out_features(), x.scalar_type());
    base_bias = bias->to(at::kFloat);
  }
  const Tensor y = in_type(gemm.run(base_bias), x.scalar_type());
  adapters.add_deltas(y, layer, h);
  return y;
}

Tensor input_gradient(const std::vector<Tensor>& dy, const Tensor& x, const std::vector<BaseWeight>& bases,
                      const Adapters& adapters, const Tensor& dh, at::ScalarType compute) {
  std::vector<Tensor> rounded;
  std::vector<BaseGemm> gemms;
  rounded.reserve(dy.size());  // GEMMs hold references
  bool by_torch = compute == x.scalar_type();
  for (size_t j = 0; j < bases.size(); ++j) {
    rounded.push_back(in_type(dy[j], compute));
    gemms.push_back(BaseGemm::backward(rounded[j], bases[j]));
    by_torch = by_torch && !gemms[j].takes_slab();
  }
  if (by_torch) {
    const Tensor dx = adapters.dx_deltas(x, dh);
    if (dx.defined()) {
      for (const BaseGemm& gemm : gemms) gemm.add_to(dx);
      return dx;
    }
  }
  if (compute == x.scalar_type() && gemms.size() == 1 && gemms[0].takes_slab()) {
    const SlabTensor slab = adapters.slab(bases[0], 0, true, dh);
    if (slab.view.depth != 0) return gemms[0].run(std::nullopt, slab.view);
  }
  std::vector<Tensor> terms;
  for (const BaseGemm& gemm : gemms) terms.push_back(in_type(gemm.run(), x.scalar_type()));
  return adapters.dx(terms, x, dh);
}

class Layers {
 public:
  using Base = BaseWeight;

  Layers(const Tensor& x, std::vector<AdapterArgs> args, const OptionalTensor& seed,
         const OptionalTensor& row_group, at::ScalarType compute)
      : device_(x, "x"),
        x_(x),
        rows_(as_rows(x, x.size(-1), "x")),
        adapters_(adapters_for(x, std::move(args), seed, row_group)),
        compute_(compute) {}

  LoraForward forward(const std::vector<BaseWeight>& bases, const std::vector<OptionalTensor>& bias) const {
    const Tensor rounded = in_type(rows_, compute_), h = adapters_->h(rows_);
    LoraForward out;
    for (size_t j = 0; j < bases.size(); ++j) {
      const Tensor y = layer_forward(rows_, rounded, bases[j], bias[j], j, *adapters_, h);
      out.y.push_back(reshaped(y, sizes_with_last(x_, bases[j].out_features())));
    }
    out.h = reshaped(h, sizes_with_last(x_, h.size(1)));
    return out;
  }

  LoraGradients backward(const std::vector<Tensor>& dy, const Tensor& h, const std::vector<BaseWeight>& bases,
                         bool need_dx, const std::vector<bool>& need_da,
                         const std::vector<bool>& need_db) const {
    for (size_t j = 0; j < dy.size(); ++j) adapters_->check_out_features(j, dy[j].size(1));
    bool need_dh = need_dx;
    for (const bool need : need_da) need_dh |= need;
    const Tensor dh = need_dh ? adapters_->dh(dy) : Tensor();
    const auto dx = [&] {
      return reshaped(input_gradient(dy, rows_, bases, *adapters_, dh, compute_), x_.sizes());
    };
    return {need_dx ? dx() : at::empty({0}, x_.options()), adapters_->da(dh, rows_, need_da),
            adapters_->db(dy, h, need_db)};
  }

 private:
  const OnDeviceOf device_;
  const Tensor& x_;
  const Tensor rows_;
  const std::unique_ptr<Adapters> adapters_;
  const at::ScalarType compute_;
};

}  // namespace

TORCH_LIBRARY_IMPL(PEFT_KERNELS_NAMESPACE, PEFT_KERNELS_DISPATCH_KEY, m) { LoraOps<Layers>::implement(m); }

}  // namespace peft_kernels::cuda
