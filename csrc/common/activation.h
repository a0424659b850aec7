// The activations of gated MLPs and of bottleneck adapters.
#pragma once

#include <cstdint>

namespace peft_kernels {

enum class Activation : uint8_t { kSilu, kGelu, kGeluTanh, kRelu };

}  // namespace peft_kernels
