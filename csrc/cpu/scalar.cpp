#include <float.h>
#include <string.h>

#include "../common/nf4.h"
#include "isa.h"

#define PEFT_KERNELS_BF16_DOT 0

namespace peft_kernels::cpu::scalar {
#include "vec_scalar.h"
#include "kernels.inl"
}  // namespace peft_kernels::cpu::scalar

namespace peft_kernels::cpu {
const KernelTable kScalarKernels = {"scalar", scalar::quantize, scalar::dequantize, scalar::gemm_nt, scalar::gemm_nn};
}
