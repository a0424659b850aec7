// Short kernels for the tests of the emulator.
#pragma once

#include <vector>

#include "cases.h"
#include "launch.cuh"

namespace peft_kernels::cuda {

// One block around a function of In and Out.
template <class In, class Out, void (*kBody)(const In*, Out*), int kCount>
struct BodyKernel {
  static constexpr int kThreads = kCount, kBlocksPerSm = 1;
  struct Params {
    const In* in;
    Out* out;
  };
  static DEVICE void run(const Params& p) { kBody(p.in, p.out); }
};

template <class In, class Out, void (*kBody)(const In*, Out*), int kCount = kWarp>
void run_kernel(const std::vector<In>& in, std::vector<Out>& out, int blocks = 1, int shared_bytes = 4096) {
  launch<BodyKernel<In, Out, kBody, kCount>>({in.data(), out.data()}, blocks, nullptr, shared_bytes);
}

}  // namespace peft_kernels::cuda
