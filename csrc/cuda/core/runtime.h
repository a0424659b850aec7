// What the ops need beside kernels: a device, its stream, its card, memory. The ops are compiled for CUDA,
// and for CPU tensors and the machine of tests/ptx; here and in runtime.cpp is all in which the two differ.
#pragma once

#include <ATen/ATen.h>

#include "../../common/autocast.h"
#include "../../common/checks.h"
#include "kernels.h"

#ifdef PEFT_KERNELS_PTX
#  define PEFT_KERNELS_NAMESPACE peft_kernels_ptx
#  define PEFT_KERNELS_DISPATCH_KEY CPU
#else
#  define PEFT_KERNELS_NAMESPACE peft_kernels_cuda
#  define PEFT_KERNELS_DISPATCH_KEY CUDA
#endif

namespace peft_kernels::cuda {

// What every op begins with. Makes the device of its first tensor the current one until the op returns:
// kernels start there, and check_device() wants all other tensors there.
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

// Of the current device.
Stream current_stream();
// Whether what is launched there is recorded for a graph.
bool is_capturing();
const Card& current_card();
int current_device();
// So many words of 8 bytes there, uninitialised.
Tensor empty_words(int64_t count);

// For one call of a function of kernels.h on the current device and stream.
class CallContext final : public Context {
 public:
  CallContext() : Context(current_card(), current_stream()) {}

  void* workspace(int64_t bytes) override;
  // For kernels on the current stream alone (see counters.cpp).
  uint32_t* counters(int64_t count) override;

 private:
  Tensor workspace_;
};

#ifdef PEFT_KERNELS_PTX
// The made-up card that kernels are planned for.
void set_card(const Card& card);
#endif

}  // namespace peft_kernels::cuda
