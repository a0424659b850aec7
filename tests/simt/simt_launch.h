// launch.cuh for the emulator: the launch runs the kernel to its end.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <type_traits>
#include <typeinfo>

#include "emulator.h"

namespace peft_kernels::cuda {

using Stream = void*;

template <class Kernel>
void launch(const typename Kernel::Params& params, int64_t blocks, Stream, int shared_bytes = 0) {
  using Params = typename Kernel::Params;
  static_assert(Kernel::kThreads % simt::kLanes == 0 && Kernel::kThreads <= 1024);
  static_assert(std::is_trivially_copyable_v<Params> && sizeof(Params) <= 4096);
  static_assert(Kernel::kBlocksPerSm >= 1);
  if (blocks == 0) return;
  if (blocks < 0 || blocks > INT32_MAX || shared_bytes < 0 || shared_bytes > simt::shared_limit) {
    throw std::runtime_error("a kernel did not start: invalid argument");
  }
  if (simt::noted_launches != nullptr) {
    simt::noted_launches->push_back({typeid(Kernel).name(), blocks, Kernel::kThreads, shared_bytes});
    return;
  }
  const Params copy = params;
  simt::run({typeid(Kernel).name(), [](const void* p) { Kernel::run(*static_cast<const Params*>(p)); }, &copy,
             Kernel::kThreads, blocks, shared_bytes});
}

}  // namespace peft_kernels::cuda
