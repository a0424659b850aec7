// What the ops need beside kernels: a device, its stream, its card, zeroed counters. The ops are compiled
// twice, for CUDA and for the emulator of tests/simt, which works on CPU tensors; here and in runtime.cpp is
// all in which the two differ.
#pragma once

#include <ATen/ATen.h>

#ifndef PEFT_KERNELS_SIMT
#  include <c10/cuda/CUDAGuard.h>
#endif

#include "../common/checks.h"
#include "kernels.h"

#ifdef PEFT_KERNELS_SIMT
#  define PEFT_KERNELS_NAMESPACE peft_kernels_simt
#  define PEFT_KERNELS_DISPATCH_KEY CPU
#else
#  define PEFT_KERNELS_NAMESPACE peft_kernels_cuda
#  define PEFT_KERNELS_DISPATCH_KEY CUDA
#endif

namespace peft_kernels::cuda {

// Makes the device of an op's first tensor the current one until the op returns: kernels start there, and
// check_device() wants all other tensors there.
class OnDeviceOf {
 public:
  OnDeviceOf(const Tensor& t, const char* name);

 private:
#ifndef PEFT_KERNELS_SIMT
  c10::cuda::OptionalCUDAGuard guard_;
#endif
};

// Of the current device.
Stream current_stream();
const Card& current_card();

// So many counters or more on the current device, for kernels on the current stream alone: zeros at first,
// and every kernel leaves them zero again. In a CUDA graph the capture's own, so that replays of it need
// nothing from outside.
uint32_t* zeroed_counters(int64_t count);

inline void check(Status status) {
  TORCH_CHECK(status == 0, "a kernel did not start: ", status_text(status));
}

#ifdef PEFT_KERNELS_SIMT
// The made-up card that the emulator's kernels are planned for.
void set_card(const Card& card);
#endif

}  // namespace peft_kernels::cuda
