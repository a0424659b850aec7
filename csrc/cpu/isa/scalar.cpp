// ISA scalar: no target pragma, so whatever the compiler's baseline gives.
#include "prelude.h"

namespace peft_kernels::cpu::scalar {
// clang-format off
#include "vec_scalar.h"
#include "kernels.inl"
// clang-format on
}  // namespace peft_kernels::cpu::scalar
