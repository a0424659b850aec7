// ISA amx_emulated: amx with its instructions emulated, for tests on machines without them.
#define PEFT_KERNELS_BF16_DOT 1
#define PEFT_KERNELS_TILES 1
#include "../../../../csrc/cpu/isa/prelude.h"

#pragma GCC target("avx512bf16,avx512vbmi,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
namespace peft_kernels::cpu::amx_emulated {
// clang-format off
#include "../../../../csrc/cpu/isa/vec_avx512.h"
#include "../../../../csrc/cpu/isa/vec_avx512_bf16.h"
#include "tiles_emulated.h"
#include "../../../../csrc/cpu/isa/kernels.inl"
// clang-format on
}  // namespace peft_kernels::cpu::amx_emulated
