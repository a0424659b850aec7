// Launches a kernel struct (see device.cuh).
#pragma once

#include <typeinfo>

#include "../../common/dtype.h"
#include "../../common/integers.h"
#include "device.cuh"
#include "stream.h"

namespace peft_kernels::cuda {

namespace detail {
template <class Kernel>
__global__ void __launch_bounds__(Kernel::kThreads, Kernel::kBlocksPerSm)
    entry(const __grid_constant__ typename Kernel::Params params) {
  Kernel::run(params);
}
}  // namespace detail

// Launches `blocks` blocks of Kernel with `shared_bytes` each; 0 blocks: does nothing.
template <class Kernel>
void launch(const typename Kernel::Params& params, int64_t blocks, Stream stream, int shared_bytes = 0) {
  if (blocks == 0) return;
  static KernelEntry kernel{reinterpret_cast<const void*>(detail::entry<Kernel>), typeid(Kernel).name(),
                            Kernel::kThreads};
  void* arguments[] = {const_cast<typename Kernel::Params*>(&params)};
  start_blocks(kernel, arguments, blocks, shared_bytes, stream);
}

// Calls `body` with a value of the type: with_type(dtype, [&](auto type) { .. decltype(type) .. }).
template <class Body>
auto with_type(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::kBF16:
      return body(bf16{});
    case DType::kF16:
      return body(fp16{});
    default:
      return body(float{});
  }
}
// The same for 16-bit types.
template <class Body>
auto with_half(DType dtype, const Body& body) {
  return dtype == DType::kBF16 ? body(bf16{}) : body(fp16{});
}

}  // namespace peft_kernels::cuda
