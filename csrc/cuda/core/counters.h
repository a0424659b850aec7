// Device counters for the kernels of a stream, in memory that torch does not manage.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace peft_kernels::cuda {

// At least `count` counters, all zero, for kernels on the stream (of the current device) that leave them zero
// again. Returns the same ones as long as they are large enough.
uint32_t* counters_on(int device, cudaStream_t stream, int64_t count);

}  // namespace peft_kernels::cuda
