// Dropout masks from op arguments.
#pragma once

#include "../../common/lora_args.h"
#include "../core/kernel_table.h"
#include "../core/parallel.h"

namespace peft_kernels::cpu {

inline DropoutMask mask_of(const Dropout& dropout, const OptionalTensor& seed, int64_t features) {
  const uint64_t key = dropout.threshold != 0 ? static_cast<uint64_t>(*seed->const_data_ptr<int64_t>()) : 0;
  return {key, dropout.stream, dropout.threshold, dropout.scale, features};
}

// out = x * mask.scale where kept, else 0. Both contiguous, of one size.
inline void run_dropout(const Tensor& x, const DropoutMask& mask, Tensor& out) {
  const DropoutParams params{x.const_data_ptr(), dtype_of(x, "x"), mask, out.mutable_data_ptr()};
  const auto dropout = kernels().dropout;
  parallel_for(0, x.numel(), kElementwiseGrain,
               [&](int64_t begin, int64_t end) { dropout(params, begin, end); });
}

}  // namespace peft_kernels::cpu
