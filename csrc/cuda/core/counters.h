// Counters of kernels on a stream, in memory that is not torch's.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace peft_kernels::cuda {

// Zeros for kernels on the stream, which is one of the current device, that leave them zero again: so many,
// or more. The same ones for as long as they are enough.
uint32_t* counters_on(int device, cudaStream_t stream, int64_t count);

}  // namespace peft_kernels::cuda
