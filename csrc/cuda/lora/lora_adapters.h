// The LoRA adapters of a call, and the GEMMs with them.
#pragma once

#include <memory>
#include <vector>

#include "../linear/linear_gemm.h"
#include "lora.h"

namespace peft_kernels::cuda {

struct Adapter : AdapterArgs {
  DropoutMask mask;

  Adapter(AdapterArgs args, const OptionalTensor& seed)
      : AdapterArgs(std::move(args)),
        mask{drops() ? seed->const_data_ptr<int64_t>() : nullptr, dropout.stream, dropout.threshold,
             dropout.scale} {}
};

// Layers share x, of m rows. h [m, ranks] = mask(x) A^T and dh [m, ranks] = scaling dY B are fp32, with the
// columns of all adapters side by side and 0 in rows that an adapter does not serve.
class Adapters {
 public:
  virtual ~Adapters() = default;
  Adapters(const Adapters&) = delete;
  Adapters& operator=(const Adapters&) = delete;

  const std::vector<Adapter>& list() const { return list_; }
  int64_t ranks() const { return ranks_of(list_); }
  void check_out_features(size_t layer, int64_t out_features) const {
    for (const Adapter& adapter : list_) {
      if (adapter.layer == layer) adapter.check_out_features(out_features);
    }
  }

  virtual Tensor h(const Tensor& x) const = 0;
  // What add_deltas() would add to a layer's GEMM with its base weight, or dx() to its gradient if there is
  // no other layer, as a slab; empty if that is not possible. `ranks` is h or dh.
  virtual SlabTensor slab(const BaseWeight& base, size_t layer, bool is_dx, const Tensor& ranks) const = 0;
  // dy: one per layer.
  virtual Tensor dh(const std::vector<Tensor>& dy) const = 0;
  // y += scaling h B^T of the layer's adapters, in the rows they serve.
  virtual void add_deltas(const Tensor& y, size_t layer, const Tensor& h) const = 0;
  // What add_deltas() adds, for a GEMM that adds to it; undefined if there is no kernel or no adapter.
  virtual Tensor deltas(const Tensor& x, size_t layer, int64_t out_features, const Tensor& h) const {
    return {};
  }
  // The sum of `terms` + mask(dh A) of all adapters, in the rows they serve; may reuse the memory of a term.
  virtual Tensor dx(const std::vector<Tensor>& terms, const Tensor& x, const Tensor& dh) const = 0;
  // mask(dh A) of all adapters, in the rows they serve; undefined as `deltas`.
  virtual Tensor dx_deltas(const Tensor& x, const Tensor& dh) const { return {}; }
  // Sums over the rows that an adapter serves, for the adapters that `need` them; the others are empty.
  virtual std::vector<Tensor> da(const Tensor& dh, const Tensor& x, const std::vector<bool>& need) const = 0;
  virtual std::vector<Tensor> db(const std::vector<Tensor>& dy, const Tensor& h,
                                 const std::vector<bool>& need) const = 0;

 protected:
  Adapters(std::vector<AdapterArgs> args, const OptionalTensor& seed, const OptionalTensor& row_group) {
    list_.reserve(args.size());
    for (AdapterArgs& adapter : args) list_.emplace_back(std::move(adapter), seed);
    if (row_group) row_group_ = row_group->contiguous();
  }

  const OptionalTensor& row_group() const { return row_group_; }

 private:
  std::vector<Adapter> list_;
  OptionalTensor row_group_;  // contiguous
};

// general_adapters: fp32 activations, torch's matmuls on blocks of rows. fused_adapters: 16-bit activations,
// kernels without an fp32 copy.
std::unique_ptr<Adapters> general_adapters(std::vector<AdapterArgs> args, const OptionalTensor& seed,
                                           const OptionalTensor& row_group);
std::unique_ptr<Adapters> fused_adapters(const Tensor& x, std::vector<AdapterArgs> args,
                                         const OptionalTensor& seed, const OptionalTensor& row_group);

// For activations like x [.., features].
inline std::unique_ptr<Adapters> adapters_for(const Tensor& x, std::vector<AdapterArgs> args,
                                              const OptionalTensor& seed, const OptionalTensor& row_group) {
  return x.scalar_type() == at::kFloat ? general_adapters(std::move(args), seed, row_group)
                                       : fused_adapters(x, std::move(args), seed, row_group);
}

}  // namespace peft_kernels::cuda
