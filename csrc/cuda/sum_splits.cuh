// The second half of a sum that several blocks have parts of.
#pragma once

#include "device.cuh"

namespace peft_kernels::cuda {

// out[i] = the sum over splits of partial[split][i].
struct SumSplits {
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerSm = 4;

  struct Params {
    const float* partial;
    int splits;
    int64_t count;
    float* out;
  };

  static DEVICE void run(const Params& p) {
    const int64_t i = int64_t{block_index()} * kThreads + thread_index();
    if (i >= p.count) return;
    float sum = 0.0f;
    for (int split = 0; split < p.splits; ++split) sum += load_constant(p.partial + split * p.count + i);
    store(p.out + i, sum);
  }
};

}  // namespace peft_kernels::cuda
