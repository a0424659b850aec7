// ISA avx2.
#include "prelude.h"

#pragma GCC target("avx2,fma,f16c")
namespace peft_kernels::cpu::avx2 {
// clang-format off
#include "vec_avx2.h"
#include "kernels.inl"
// clang-format on
}  // namespace peft_kernels::cpu::avx2
