// The types that activations and dense weights may have.
#pragma once

#include <cstdint>

namespace peft_kernels {

enum class DType : uint8_t { kF32, kBF16, kF16 };

}  // namespace peft_kernels
