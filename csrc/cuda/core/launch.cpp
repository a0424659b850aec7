// Launches kernels and reports launch failures.
#include <cxxabi.h>

#include <cstdlib>
#include <memory>
#include <stdexcept>
#include <string>

#include "stream.h"

namespace peft_kernels::cuda {
namespace {

constexpr int64_t kMostBlocks = 0x7fffffff;
// Dynamic shared memory that needs no opt-in.
constexpr int kDefaultSharedBytes = 48 << 10;

std::string name_of(const KernelEntry& kernel) {
  int status = 0;
  const std::unique_ptr<char, void (*)(void*)> name(
      abi::__cxa_demangle(kernel.name, nullptr, nullptr, &status), std::free);
  return status == 0 ? name.get() : kernel.name;
}

std::string text(cudaError_t error) {
  return std::string(cudaGetErrorString(error)) + " (" + cudaGetErrorName(error) + ")";
}

// Whether the error comes from an earlier kernel: such errors are reported by whatever call comes next.
bool is_asynchronous(cudaError_t error) {
  switch (error) {
    case cudaErrorIllegalAddress:
    case cudaErrorIllegalInstruction:
    case cudaErrorMisalignedAddress:
    case cudaErrorInvalidAddressSpace:
    case cudaErrorInvalidPc:
    case cudaErrorHardwareStackError:
    case cudaErrorAssert:
    case cudaErrorLaunchTimeout:
    case cudaErrorLaunchFailure:
    case cudaErrorECCUncorrectable:
      return true;
    default:
      return false;
  }
}

[[noreturn]] void fail(const KernelEntry& kernel, int64_t blocks, int shared_bytes, const std::string& why) {
  throw std::runtime_error(name_of(kernel) + ": launch failed, with " + std::to_string(blocks) +
                           " blocks of " + std::to_string(kernel.threads) + " threads and " +
                           std::to_string(shared_bytes) + " bytes of shared memory each: " + why);
}

cudaError_t allow_large_shared(KernelEntry& kernel) {
  int device = 0, most = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const uint64_t bit = device < 64 ? uint64_t{1} << device : 0;
  if ((kernel.has_large_shared.load(std::memory_order_relaxed) & bit) != 0) return cudaSuccess;
  error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return error;
  error = cudaFuncSetAttribute(kernel.entry, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  if (error == cudaSuccess) kernel.has_large_shared.fetch_or(bit, std::memory_order_relaxed);
  return error;
}

}  // namespace

void start_blocks(KernelEntry& kernel, void** arguments, int64_t blocks, int shared_bytes, Stream stream) {
  if (blocks < 0 || blocks > kMostBlocks) {
    fail(kernel, blocks, shared_bytes, "expected at most 2147483647 blocks");
  }
  // An error that an earlier call left pending would be attributed to this kernel, or to the next one of
  // torch. cudaErrorNotReady (of an event) is not an error.
  if (const cudaError_t earlier = cudaGetLastError();
      earlier != cudaSuccess && earlier != cudaErrorNotReady) {
    fail(kernel, blocks, shared_bytes, "an earlier CUDA call left this error pending: " + text(earlier));
  }
  cudaError_t error = shared_bytes > kDefaultSharedBytes ? allow_large_shared(kernel) : cudaSuccess;
  if (error == cudaSuccess) {
    error = cudaLaunchKernel(kernel.entry, dim3(static_cast<unsigned>(blocks)),
                             dim3(static_cast<unsigned>(kernel.threads)), arguments,
                             static_cast<size_t>(shared_bytes), stream);
  }
  if (error == cudaSuccess) return;
  cudaGetLastError();  // clear it: torch would report it after its next kernel
  fail(kernel, blocks, shared_bytes,
       (is_asynchronous(error) ? "an earlier kernel failed: " : "") + text(error));
}

}  // namespace peft_kernels::cuda
