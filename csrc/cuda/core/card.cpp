// Queries the properties of a card.
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

#include "kernels.h"

namespace peft_kernels::cuda {
namespace {

int attribute(cudaDeviceAttr name, const char* what, int device) {
  int value = 0;
  if (const cudaError_t error = cudaDeviceGetAttribute(&value, name, device); error != cudaSuccess) {
    cudaGetLastError();  // clear it: torch would report it after its next kernel
    throw std::runtime_error("cuda:" + std::to_string(device) + ": cannot query " + what + ": " +
                             cudaGetErrorString(error));
  }
  return value;
}

}  // namespace

Card card_of(int device) {
  const int major = attribute(cudaDevAttrComputeCapabilityMajor, "the compute capability", device),
            minor = attribute(cudaDevAttrComputeCapabilityMinor, "the compute capability", device);
  return {10 * major + minor,
          attribute(cudaDevAttrMultiProcessorCount, "the number of multiprocessors", device),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, "the shared memory of a block", device),
          attribute(cudaDevAttrReservedSharedMemoryPerBlock, "the reserved shared memory", device)};
}

}  // namespace peft_kernels::cuda
