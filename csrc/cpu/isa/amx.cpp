// ISA amx: avx512_bf16, with bf16 GEMMs on AMX tiles.
#define PEFT_KERNELS_BF16_DOT 1
#define PEFT_KERNELS_TILES 1
#include "prelude.h"

#pragma GCC target("avx512bf16,avx512vbmi,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prfchw")
namespace peft_kernels::cpu::amx {
// clang-format off
#include "vec_avx512.h"
#include "vec_avx512_bf16.h"
#include "tiles_amx.h"
#include "kernels.inl"
// clang-format on
}  // namespace peft_kernels::cpu::amx
