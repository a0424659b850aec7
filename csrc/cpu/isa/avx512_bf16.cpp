// ISA avx512_bf16: avx512 with dot products of bf16 pairs (vdpbf16ps) and byte permutations (avx512vbmi).
// Every processor with the former has the latter, except Cooper Lake.
#define PEFT_KERNELS_BF16_DOT 1
#include "prelude.h"

#pragma GCC target("avx512bf16,avx512vbmi,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prfchw")
namespace peft_kernels::cpu::avx512_bf16 {
// clang-format off
#include "vec_avx512.h"
#include "vec_avx512_bf16.h"
#include "kernels.inl"
// clang-format on
}  // namespace peft_kernels::cpu::avx512_bf16
