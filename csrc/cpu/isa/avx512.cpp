// ISA avx512.
#include "prelude.h"

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prfchw")
namespace peft_kernels::cpu::avx512 {
// clang-format off
#include "vec_avx512.h"
#include "kernels.inl"
// clang-format on
}  // namespace peft_kernels::cpu::avx512
