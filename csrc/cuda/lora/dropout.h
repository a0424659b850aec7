// Dropout by Philox, alone and as the mask of an adapter.
#pragma once

#include "../core/kernels.h"

namespace peft_kernels::cuda {

// Dropout as in peft_kernels/ops/lora/dropout.py: keeps elements where Philox(seed, stream, element) >=
// threshold and multiplies them by scale.
struct DropoutMask {
  const int64_t* seed;  // on the device, or null: nothing dropped
  uint32_t stream;
  uint32_t threshold;
  float scale;
};

// out[i] = x[i] * mask.scale where the mask keeps element first + i, else x[i] * 0. `first` allows a slice of
// larger activations.
void dropout(const void* x, DType dtype, int64_t numel, int64_t first, const DropoutMask& mask, void* out,
             Stream stream);

}  // namespace peft_kernels::cuda
