// Level avx512_bf16: avx512 with products of bf16 pairs (vdpbf16ps). System headers come before the pragma:
// what they define must stay baseline code.
#include <float.h>
#include <immintrin.h>
#include <string.h>

#include "../common/nf4.h"
#include "isa.h"

#define PEFT_KERNELS_BF16_DOT 1
#define PEFT_KERNELS_TILES 0

#pragma GCC push_options
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
namespace peft_kernels::cpu::avx512_bf16 {
// clang-format off
#include "vec_avx512.h"
#include "vec_avx512_bf16.h"
#include "kernels.inl"
// clang-format on
}  // namespace peft_kernels::cpu::avx512_bf16
#pragma GCC pop_options

namespace peft_kernels::cpu {
const KernelTable kAvx512Bf16Kernels = PEFT_KERNELS_TABLE(avx512_bf16);
}
