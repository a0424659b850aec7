// The activations of gated MLPs.
#pragma once

#include <cstdint>

namespace peft_kernels {

enum class Activation : uint8_t { kSilu, kGelu, kGeluTanh, kRelu };

}  // namespace peft_kernels
