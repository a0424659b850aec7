// Starting a kernel (see device.cuh): by nvcc on a stream, under the emulator on the CPU.
#pragma once

#include "device.cuh"

#ifdef PEFT_KERNELS_SIMT
#  include "simt_launch.h"
#else

#  include <cuda_runtime.h>

namespace peft_kernels::cuda {

using Stream = cudaStream_t;
// 0, or why a launch failed.
using Status = int;

namespace detail {
template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kBlocksPerSm)
    entry(const __grid_constant__ typename Kernel::Params params) {
  Kernel::run(params);
}
}  // namespace detail

// Runs `blocks` blocks of Kernel with that much shared memory each; nothing at all for 0 blocks.
template <class Kernel>
Status launch(const typename Kernel::Params& params, int64_t blocks, Stream stream, int shared_bytes = 0) {
  if (blocks == 0) return 0;
  const auto entry = detail::entry<Kernel>;
  // What a kernel has without asking.
  constexpr int kDefaultSharedBytes = 48 << 10;
  if (shared_bytes > kDefaultSharedBytes) {
    const cudaError_t error =
        cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  // Not `<<<>>>`, which clang-format takes apart.
  void* arguments[] = {const_cast<typename Kernel::Params*>(&params)};
  return cudaLaunchKernel(entry, dim3(static_cast<unsigned>(blocks)), dim3(Kernel::kThreads), arguments,
                          static_cast<size_t>(shared_bytes), stream);
}

inline const char* status_text(Status status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); }

}  // namespace peft_kernels::cuda

#endif
