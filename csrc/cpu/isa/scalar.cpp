// ISA scalar: no target pragma, so whatever the compiler's baseline gives.
#ifdef __x86_64__
#  pragma GCC optimize("O1")  // compiles in a quarter of the time; x86 CPUs without AVX2 are rare
#endif
#include "prelude.h"

namespace peft_kernels::cpu::scalar {
// clang-format off
#include "vec_scalar.h"
#include "kernels.inl"
// clang-format on
}  // namespace peft_kernels::cpu::scalar
