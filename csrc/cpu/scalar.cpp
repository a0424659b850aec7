// The portable level: no target pragma, so whatever the compiler's baseline gives.
#include <float.h>
#include <string.h>

#include "../common/nf4.h"
#include "isa.h"

#define PEFT_KERNELS_BF16_DOT 0
#define PEFT_KERNELS_TILES 0

namespace peft_kernels::cpu::scalar {
// clang-format off
#include "vec_scalar.h"
#include "kernels.inl"
// clang-format on
}  // namespace peft_kernels::cpu::scalar

namespace peft_kernels::cpu {
const KernelTable kScalarKernels = PEFT_KERNELS_TABLE(scalar);
}
