// What host code and the starting of kernels have in common. For every compiler: no device code.
#pragma once

#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>

namespace peft_kernels::cuda {

using Stream = cudaStream_t;

// What there is of a kernel, once in a process.
struct KernelEntry {
  const void* entry;
  const char* name;  // its typeid's
  int threads;       // of a block
  // By device: whether it may have all the shared memory that blocks can have there.
  std::atomic<uint64_t> has_large_shared{0};
};

// Starts `blocks` blocks of the kernel, with that much shared memory each.
void start_blocks(KernelEntry& kernel, void** arguments, int64_t blocks, int shared_bytes, Stream stream);

}  // namespace peft_kernels::cuda
