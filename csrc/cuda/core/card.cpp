#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "kernels.h"

namespace peft_kernels::cuda {
namespace {

int attribute(cudaDeviceAttr name, const char* what, int device) {
  int value = 0;
  if (const cudaError_t error = cudaDeviceGetAttribute(&value, name, device); error != cudaSuccess) {
    cudaGetLastError();  // or torch would find it after its next kernel
    throw std::runtime_error("cuda:" + std::to_string(device) + " does not tell " + what + ": " +
                             cudaGetErrorString(error));
  }
  return value;
}

}  // namespace

Card card_of(int device) {
  const int major = attribute(cudaDevAttrComputeCapabilityMajor, "its compute capability", device),
            minor = attribute(cudaDevAttrComputeCapabilityMinor, "its compute capability", device);
  return {10 * major + minor,
          attribute(cudaDevAttrMultiProcessorCount, "how many multiprocessors it has", device),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, "how much shared memory a block has", device),
          attribute(cudaDevAttrReservedSharedMemoryPerBlock, "how much shared memory is reserved", device)};
}

}  // namespace peft_kernels::cuda
