// ISA neon: what every 64-bit Arm processor has, so there is no target pragma.
#include "prelude.h"

namespace peft_kernels::cpu::neon {
// clang-format off
#include "vec_neon.h"
#include "kernels.inl"
// clang-format on
}  // namespace peft_kernels::cpu::neon
