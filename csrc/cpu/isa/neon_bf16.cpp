// ISA neon_bf16: neon with dot products of bf16 pairs (bfdot), where the compiler accepts the pragma.
#define PEFT_KERNELS_BF16_DOT 1
#include "prelude.h"

#if PEFT_KERNELS_HAS_NEON_BF16
#  pragma GCC target("arch=armv8.2-a+bf16")
namespace peft_kernels::cpu::neon_bf16 {
// clang-format off
#include "vec_neon.h"
#include "vec_neon_bf16.h"
#include "kernels.inl"
// clang-format on
}  // namespace peft_kernels::cpu::neon_bf16
#endif
