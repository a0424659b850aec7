// Level avx2. System headers come before the pragma: what they define must stay baseline code.
#include <float.h>
#include <immintrin.h>
#include <string.h>

#include "../common/nf4.h"
#include "isa.h"

#define PEFT_KERNELS_BF16_DOT 0
#define PEFT_KERNELS_TILES 0

#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
namespace peft_kernels::cpu::avx2 {
// clang-format off
#include "vec_avx2.h"
#include "kernels.inl"
// clang-format on
}  // namespace peft_kernels::cpu::avx2
#pragma GCC pop_options

namespace peft_kernels::cpu {
const KernelTable kAvx2Kernels = PEFT_KERNELS_TABLE(avx2);
}
