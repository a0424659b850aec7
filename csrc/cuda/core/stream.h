// Streams and kernel launches, without device code: for every compiler.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>

namespace peft_kernels::cuda {

using Stream = cudaStream_t;

// A kernel, one instance per process.
struct KernelEntry {
  const void* entry;
  const char* name;  // its typeid's
  int threads;       // of a block
  // Bit per device: whether its shared memory limit was raised to the maximum.
  std::atomic<uint64_t> has_large_shared{0};
};

// Launches `blocks` blocks of the kernel, with `shared_bytes` of shared memory each.
void start_blocks(KernelEntry& kernel, void** arguments, int64_t blocks, int shared_bytes, Stream stream);

}  // namespace peft_kernels::cuda
