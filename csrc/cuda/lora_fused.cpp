#include "lora_adapters.h"

namespace peft_kernels::cuda {
namespace {

// A slab is worth its copies as long as it is shallow beside the weight.
bool is_shallow(int64_t depth, const BaseWeight& base) {
  return depth > 0 && depth <= std::min(base.in_features(), base.out_features()) / 4;
}

class FusedAdapters : public Adapters {
 public:
  FusedAdapters(const Tensor& x, std::vector<AdapterArgs> args, const OptionalTensor& seed,
                const OptionalTensor& groups)
      : Adapters(std::move(args), seed, groups), dtype_(x.scalar_type()) {
    for (const Adapter& adapter : list()) {
      views_.push_back({adapter.a.const_data_ptr(), adapter.b.const_data_ptr(), dtype_of(adapter.a, "lora_a"),
                        dtype_of(adapter.b, "lora_b"), static_cast<int>(adapter.rank()),
                        static_cast<int>(adapter.layer), adapter.h_begin, adapter.scaling, adapter.group,
                        adapter.mask});
    }
    batch_ = {dtype_of(x, "x"), rows_of(x),
              x.size(-1),       row_group() ? row_group()->const_data_ptr<int64_t>() : nullptr,
              views_.data(),    static_cast<int>(views_.size()),
              ranks()};
  }

  Tensor h(const Tensor& x) const override {
    Tensor h = empty_ranks(x);
    const Tensor scratch = empty_bytes(x, lora_h_workspace(batch_, current_card()));
    check(lora_h(batch_, x.const_data_ptr(), h.mutable_data_ptr<float>(), current_card(),
                 scratch.mutable_data_ptr(), current_stream()));
    return h;
  }

  Tensor dh(const std::vector<Tensor>& dy) const override {
    if (dy.empty()) return {};
    const std::vector<LayerGradient> layers = gradients(dy);
    const int count = static_cast<int>(layers.size());
    Tensor dh = empty_ranks(dy[0]);
    const Tensor scratch = empty_bytes(dh, lora_dh_workspace(batch_, layers.data(), count, current_card()));
    check(lora_dh(batch_, layers.data(), count, dh.mutable_data_ptr<float>(), current_card(),
                  scratch.mutable_data_ptr(), current_stream()));
    return dh;
  }

  SlabTensors slab(const BaseWeight& base, size_t layer, const Tensor& h) const override {
    const int64_t depth = lora_slab_depth(batch_, static_cast<int>(layer));
    // In a slab, zeros of h would meet the adapters of other rows: with an Inf there, they are not zeros.
    if (row_group() || !is_shallow(depth, base)) return {};
    const auto options = h.options().dtype(dtype_);
    SlabTensors slab{at::empty({batch_.m, depth}, options), at::empty({base.out_features(), depth}, options)};
    check(lora_slab(batch_, static_cast<int>(layer), base.out_features(), h.const_data_ptr<float>(),
                    slab.u.mutable_data_ptr(), slab.v.mutable_data_ptr(), current_stream()));
    return slab;
  }

  SlabTensors dx_slab(const BaseWeight& base, const Tensor& dh) const override {
    const int64_t depth = lora_dx_slab_depth(batch_);
    bool any_drops = false;
    for (const Adapter& adapter : list()) any_drops |= adapter.drops();
    if (row_group() || any_drops || !is_shallow(depth, base)) return {};
    const auto options = dh.options().dtype(dtype_);
    SlabTensors slab{at::empty({batch_.m, depth}, options), at::empty({depth, batch_.k}, options)};
    check(lora_dx_slab(batch_, dh.const_data_ptr<float>(), slab.u.mutable_data_ptr(),
                       slab.v.mutable_data_ptr(), current_stream()));
    return slab;
  }

  Tensor with_deltas(const Tensor& y, size_t layer, const Tensor& h) const override {
    bool any = false;
    for (const Adapter& adapter : list()) any |= adapter.layer == layer;
    if (!any) return y;
    const void* term = y.const_data_ptr();
    check(lora_y(batch_, static_cast<int>(layer), &term, 1, y.size(1), h.const_data_ptr<float>(),
                 y.mutable_data_ptr(), current_stream()));
    return y;
  }

  Tensor dx(const std::vector<Tensor>& terms, const Tensor& x, const Tensor& dh) const override {
    if (terms.empty()) return at::zeros(x.sizes(), x.options());
    if (terms.size() == 1 && list().empty()) return terms[0];
    std::vector<const void*> pointers;
    for (const Tensor& term : terms) pointers.push_back(term.const_data_ptr());
    check(lora_dx(batch_, pointers.data(), static_cast<int>(pointers.size()),
                  dh.defined() ? dh.const_data_ptr<float>() : nullptr, terms[0].mutable_data_ptr(),
                  current_stream()));
    return terms[0];
  }

  std::vector<Tensor> da(const Tensor& dh, const Tensor& x, const std::vector<bool>& need) const override {
    std::vector<Tensor> found;
    for (size_t i = 0; i < list().size(); ++i) found.push_back(empty_gradient(list()[i].a, need[i]));
    const std::vector<void*> out = pointers_of(found, need);
    if (out.empty()) return found;
    const Tensor scratch = empty_bytes(x, lora_da_workspace(batch_, out.data(), current_card()));
    check(lora_da(batch_, x.const_data_ptr(), dh.const_data_ptr<float>(), out.data(), current_card(),
                  scratch.mutable_data_ptr(), current_stream()));
    return found;
  }

  std::vector<Tensor> db(const std::vector<Tensor>& dy, const Tensor& h,
                         const std::vector<bool>& need) const override {
    std::vector<Tensor> found;
    for (size_t i = 0; i < list().size(); ++i) found.push_back(empty_gradient(list()[i].b, need[i]));
    const std::vector<void*> out = pointers_of(found, need);
    if (out.empty()) return found;
    const std::vector<LayerGradient> layers = gradients(dy);
    const int count = static_cast<int>(layers.size());
    const Tensor scratch =
        empty_bytes(h, lora_db_workspace(batch_, layers.data(), count, out.data(), current_card()));
    check(lora_db(batch_, layers.data(), count, h.const_data_ptr<float>(), out.data(), current_card(),
                  scratch.mutable_data_ptr(), current_stream()));
    return found;
  }

 private:
  Tensor empty_ranks(const Tensor& like) const {
    return at::empty({batch_.m, ranks()}, like.options().dtype(at::kFloat));
  }
  static Tensor empty_bytes(const Tensor& like, int64_t bytes) {
    return at::empty({bytes}, like.options().dtype(at::kByte));
  }
  static Tensor empty_gradient(const Tensor& parameter, bool needed) {
    return needed ? at::empty(parameter.sizes(), parameter.options()) : at::empty({0}, parameter.options());
  }

  static std::vector<LayerGradient> gradients(const std::vector<Tensor>& dy) {
    std::vector<LayerGradient> layers;
    for (const Tensor& d : dy) layers.push_back({d.const_data_ptr(), d.size(1)});
    return layers;
  }

  // Null for those that are not needed; empty when none is.
  static std::vector<void*> pointers_of(const std::vector<Tensor>& found, const std::vector<bool>& need) {
    std::vector<void*> pointers;
    bool any = false;
    for (size_t i = 0; i < found.size(); ++i) {
      pointers.push_back(need[i] ? found[i].mutable_data_ptr() : nullptr);
      any |= need[i];
    }
    return any ? pointers : std::vector<void*>{};
  }

  at::ScalarType dtype_;
  std::vector<AdapterView> views_;
  LoraBatch batch_;
};

}  // namespace

std::unique_ptr<Adapters> fused_adapters(const Tensor& x, std::vector<AdapterArgs> args,
                                         const OptionalTensor& seed, const OptionalTensor& row_group) {
  return std::make_unique<FusedAdapters>(x, std::move(args), seed, row_group);
}

}  // namespace peft_kernels::cuda
