// The dtypes of activations and dense weights.
#pragma once

#include <cstdint>

namespace peft_kernels {

enum class DType : uint8_t { kF32, kBF16, kF16 };

}  // namespace peft_kernels
