#include "lora_adapters.h"

namespace peft_kernels::cuda {

Adapter::Adapter(AdapterArgs args, const OptionalTensor& seed)
    : AdapterArgs(std::move(args)),
      mask{drops() ? seed->const_data_ptr<int64_t>() : nullptr, dropout.stream, dropout.threshold,
           dropout.scale} {}

Adapters::Adapters(std::vector<AdapterArgs> args, const OptionalTensor& seed, const OptionalTensor& row_group)
    : seed_(seed) {
  list_.reserve(args.size());
  for (AdapterArgs& adapter : args) list_.emplace_back(std::move(adapter), seed);
  if (row_group) row_group_ = row_group->contiguous();
}

void Adapters::check_out_features(size_t layer, int64_t out_features) const {
  for (const Adapter& adapter : list_) {
    if (adapter.layer == layer) adapter.check_out_features(out_features);
  }
}

std::unique_ptr<Adapters> adapters_for(const Tensor& x, std::vector<AdapterArgs> args,
                                       const OptionalTensor& seed, const OptionalTensor& row_group) {
  return x.scalar_type() == at::kFloat ? general_adapters(std::move(args), seed, row_group)
                                       : fused_adapters(x, std::move(args), seed, row_group);
}

}  // namespace peft_kernels::cuda
