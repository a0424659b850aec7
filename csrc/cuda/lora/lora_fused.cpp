// Adapters on 16-bit activations: the kernels of lora.h.
#include <ATen/ATen.h>

#include "lora_adapters.h"

namespace peft_kernels::cuda {
namespace {

// A slab pays for its copies if it is shallow compared with the weight.
bool is_shallow(int64_t depth, const BaseWeight& base) {
  return depth > 0 && depth <= std::min(base.in_features(), base.out_features()) / 4;
}

class FusedAdapters : public Adapters {
 public:
  FusedAdapters(const Tensor& x, std::vector<AdapterArgs> args, const OptionalTensor& seed,
                const OptionalTensor& groups)
      : Adapters(std::move(args), seed, groups),
        batch_{dtype_of(x, "x"), rows_of(x),
               x.size(-1),       row_group() ? row_group()->const_data_ptr<int64_t>() : nullptr,
               ranks(),          {}} {
    batch_.adapters.reserve(list().size());
    for (const Adapter& adapter : list()) {
      batch_.adapters.push_back({adapter.a.const_data_ptr(), adapter.b.const_data_ptr(),
                                 dtype_of(adapter.a, "lora_a"), dtype_of(adapter.b, "lora_b"),
                                 static_cast<int>(adapter.rank()), static_cast<int>(adapter.layer),
                                 adapter.h_begin, adapter.scaling, adapter.group, adapter.mask});
    }
  }

  Tensor h(const Tensor& x) const override {
    Tensor h = empty_ranks(x);
    CallContext context;
    lora_h(batch_, x.const_data_ptr(), h.mutable_data_ptr<float>(), context);
    return h;
  }

  Tensor dh(const std::vector<Tensor>& dy) const override {
    if (dy.empty()) return {};
    Tensor dh = empty_ranks(dy[0]);
    CallContext context;
    lora_dh(batch_, activations(dy), dh.mutable_data_ptr<float>(), context);
    return dh;
  }

  SlabTensor slab(const BaseWeight& base, size_t layer, bool is_dx, const Tensor& ranks) const override {
    const int64_t depth = lora_slab_depth(batch_, static_cast<int>(layer), is_dx);
    bool any_drops = false;
    for (const Adapter& adapter : list()) any_drops |= adapter.drops();
    // In a slab, the zeros of h would multiply the adapters of other rows, and 0 * Inf is not 0.
    if (row_group() || (is_dx && any_drops) || !is_shallow(depth, base)) return {};
    const int64_t v_rows = is_dx ? base.in_features() : base.out_features();
    const Tensor memory = at::empty({batch_.m + v_rows, depth}, ranks.options().dtype(at::kBFloat16));
    char* u = static_cast<char*>(memory.mutable_data_ptr());
    char* v = u + batch_.m * depth * memory.element_size();
    lora_slab(batch_, static_cast<int>(layer), is_dx, v_rows, ranks.const_data_ptr<float>(), u, v,
              current_stream());
    return {memory, {u, v, static_cast<int>(depth)}};
  }

  void add_deltas(const Tensor& y, size_t layer, const Tensor& h) const override {
    lora_y(batch_, static_cast<int>(layer), y.size(1), h.const_data_ptr<float>(), y.mutable_data_ptr(),
           current_stream());
  }

  Tensor deltas(const Tensor& x, size_t layer, int64_t out_features, const Tensor& h) const override {
    bool any = false;
    for (const Adapter& adapter : list()) any |= adapter.layer == static_cast<int64_t>(layer);
    // With row groups, rows without an adapter have the bits of the base alone.
    if (!any || row_group()) return {};
    Tensor y = at::empty({batch_.m, out_features}, x.options());
    lora_deltas(batch_, static_cast<int>(layer), out_features, h.const_data_ptr<float>(),
                y.mutable_data_ptr(), current_stream());
    return y;
  }

  Tensor dx_deltas(const Tensor& x, const Tensor& dh) const override {
    if (list().empty() || row_group()) return {};
    Tensor dx = at::empty(x.sizes(), x.options());
    lora_dx(batch_, {}, dh.const_data_ptr<float>(), dx.mutable_data_ptr(), current_stream());
    return dx;
  }

  Tensor dx(const std::vector<Tensor>& terms, const Tensor& x, const Tensor& dh) const override {
    if (terms.empty()) return at::zeros(x.sizes(), x.options());
    if (terms.size() == 1 && list().empty()) return terms[0];
    std::vector<const void*> pointers;
    for (const Tensor& term : terms) pointers.push_back(term.const_data_ptr());
    lora_dx(batch_, pointers, dh.defined() ? dh.const_data_ptr<float>() : nullptr,
            terms[0].mutable_data_ptr(), current_stream());
    return terms[0];
  }

  std::vector<Tensor> da(const Tensor& dh, const Tensor& x, const std::vector<bool>& need) const override {
    return gradients(&Adapter::a, need, [&](const std::vector<void*>& out, Context& context) {
      lora_da(batch_, x.const_data_ptr(), dh.const_data_ptr<float>(), out, context);
    });
  }

  std::vector<Tensor> db(const std::vector<Tensor>& dy, const Tensor& h,
                         const std::vector<bool>& need) const override {
    return gradients(&Adapter::b, need, [&](const std::vector<void*>& out, Context& context) {
      lora_db(batch_, activations(dy), h.const_data_ptr<float>(), out, context);
    });
  }

 private:
  Tensor empty_ranks(const Tensor& like) const {
    return at::empty({batch_.m, ranks()}, like.options().dtype(at::kFloat));
  }
  static std::vector<Activations> activations(const std::vector<Tensor>& dy) {
    std::vector<Activations> layers;
    for (const Tensor& d : dy) layers.push_back({d.const_data_ptr(), d.size(1)});
    return layers;
  }

  // The gradients of the needed parameters, computed by `compute` if there are any; the others are empty.
  template <class Compute>
  std::vector<Tensor> gradients(Tensor AdapterArgs::* parameter, const std::vector<bool>& need,
                                const Compute& compute) const {
    std::vector<Tensor> found;
    std::vector<void*> out;
    bool any = false;
    for (size_t i = 0; i < list().size(); ++i) {
      found.push_back(empty_unless(need[i], list()[i].*parameter));
      out.push_back(need[i] ? found[i].mutable_data_ptr() : nullptr);
      any |= need[i];
    }
    if (any) {
      CallContext context;
      compute(out, context);
    }
    return found;
  }

  LoraBatch batch_;
};

}  // namespace

std::unique_ptr<Adapters> fused_adapters(const Tensor& x, std::vector<AdapterArgs> args,
                                         const OptionalTensor& seed, const OptionalTensor& row_group) {
  return std::make_unique<FusedAdapters>(x, std::move(args), seed, row_group);
}

}  // namespace peft_kernels::cuda
