// Dropout masks from op arguments.
#pragma once

#include <cmath>

#include "checks.h"
#include "isa.h"
#include "parallel.h"

namespace peft_kernels::cpu {

// As dropout_threshold and dropout_scale in peft_kernels/reference/dropout.py.
inline DropoutMask mask_of(double p, const OptionalTensor& seed, uint32_t stream, int64_t features) {
  TORCH_CHECK(0.0 <= p && p <= 1.0, "dropout_p: expected 0 to 1, got ", p);
  if (p == 0.0) return {0, stream, 0, 1.0f, features};
  TORCH_CHECK(seed.has_value(), "seed: expected an int64 tensor of one element with dropout_p ", p,
              ", got none");
  check_dtype(*seed, at::kLong, "seed");
  check_numel(*seed, 1, "seed");
  const double threshold = std::min(std::nearbyint(p * 0x1p32), 0x1p32 - 1);
  return {static_cast<uint64_t>(*seed->const_data_ptr<int64_t>()), stream, static_cast<uint32_t>(threshold),
          p < 1.0 ? static_cast<float>(1.0 / (1.0 - p)) : 0.0f, features};
}

// out = x where kept, times mask.scale. Both contiguous, of one size.
inline void run_dropout(const Tensor& x, const DropoutMask& mask, Tensor& out) {
  const DropoutParams params{x.const_data_ptr(), dtype_of(x, "x"), mask, out.mutable_data_ptr()};
  const auto dropout = kernels().dropout;
  parallel_for(0, x.numel(), kElementwiseGrain,
               [&](int64_t begin, int64_t end) { dropout(params, begin, end); });
}

}  // namespace peft_kernels::cpu
