// What the ops need beside kernels: a device, its stream, its card, memory. The ops are compiled for CUDA,
// and for the emulators of tests/simt and tests/ptx, which work on CPU tensors; here and in runtime.cpp is
// all in which they differ.
#pragma once

#include <ATen/ATen.h>

#if defined(PEFT_KERNELS_SIMT) || defined(PEFT_KERNELS_PTX)
#  define PEFT_KERNELS_ON_CPU
#else
#  include <c10/cuda/CUDAGuard.h>
#endif

#include "../common/checks.h"
#include "kernels.h"

#ifdef PEFT_KERNELS_SIMT
#  define PEFT_KERNELS_NAMESPACE peft_kernels_simt
#  define PEFT_KERNELS_DISPATCH_KEY CPU
#elif defined(PEFT_KERNELS_PTX)
#  define PEFT_KERNELS_NAMESPACE peft_kernels_ptx
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
#ifndef PEFT_KERNELS_ON_CPU
  c10::cuda::OptionalCUDAGuard guard_;
#endif
};

// Of the current device.
Stream current_stream();
const Card& current_card();

// For one call of a function of kernels.h on the current device and stream.
class CallContext final : public Context {
 public:
  CallContext() : Context(current_card(), current_stream()) {}

  void* workspace(int64_t bytes) override;
  // For kernels on the current stream alone: zeros at first, and every kernel leaves them zero again. In a
  // CUDA graph the capture's own, so that replays of it need nothing from outside.
  uint32_t* counters(int64_t count) override;

 private:
  Tensor workspace_;
};

#ifdef PEFT_KERNELS_ON_CPU
// The made-up card that the emulator's kernels are planned for.
void set_card(const Card& card);
#endif

}  // namespace peft_kernels::cuda
