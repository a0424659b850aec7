// The device, stream, card and memory that ops use. Ops are compiled for CUDA, and for CPU tensors with the
// PTX machine of tests/gpu/ptx; only this file and runtime.cpp differ between the two.
#pragma once

#include <ATen/ATen.h>

#include "../../common/autocast.h"
#include "../../common/checks.h"
#include "../../common/namespace.h"
#include "kernels.h"

#ifdef PEFT_KERNELS_PTX
#  define PEFT_KERNELS_NAMESPACE PEFT_KERNELS_JOIN(PEFT_KERNELS_PACKAGE, _ptx)
#  define PEFT_KERNELS_DISPATCH_KEY CPU
#else
#  define PEFT_KERNELS_NAMESPACE PEFT_KERNELS_JOIN(PEFT_KERNELS_PACKAGE, _cuda)
#  define PEFT_KERNELS_DISPATCH_KEY CUDA
#endif

namespace peft_kernels::cuda {

// Makes the device of an op's first tensor current until the op returns. Every op starts with it: kernels
// launch there, and check_device() expects all other tensors there.
class OnDeviceOf {
 public:
  OnDeviceOf(const Tensor& t, const char* name);
  ~OnDeviceOf();
  OnDeviceOf(const OnDeviceOf&) = delete;
  OnDeviceOf& operator=(const OnDeviceOf&) = delete;

 private:
  const WithoutAutocast without_autocast_;
  c10::DeviceIndex before_ = -1;
};

// Of the current device:
Stream current_stream();
// Whether the current stream is being captured into a graph.
bool is_capturing();
const Card& current_card();
int current_device();
// `count` uninitialised words of 8 bytes.
Tensor empty_words(int64_t count);

// The Context of one call, on the current device and stream.
class CallContext final : public Context {
 public:
  CallContext() : Context(current_card(), current_stream()) {}

  void* workspace(int64_t bytes) override;
  // Only for kernels on the current stream (see counters.cpp).
  uint32_t* counters(int64_t count) override;

 private:
  Tensor workspace_;
};

#ifdef PEFT_KERNELS_PTX
// The simulated card that kernels are planned for.
void set_card(const Card& card);
void set_capturing(bool value);
#endif

}  // namespace peft_kernels::cuda
