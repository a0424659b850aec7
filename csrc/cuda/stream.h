// What host code and the starting of kernels have in common. For every compiler: no device code.
#pragma once

#ifdef PEFT_KERNELS_SIMT
#  include "simt_launch.h"
#else

#  include <cuda_runtime_api.h>

namespace peft_kernels::cuda {
using Stream = cudaStream_t;
}  // namespace peft_kernels::cuda

#endif
