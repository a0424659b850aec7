// Sums of the rows of each group: gradients of biases.
#pragma once

#include "../core/launch.cuh"
#include "multi_bottleneck.h"

namespace peft_kernels::cuda {

// A block has 32 columns of a group: a warp sums every eighth
// row, and the warps' sums are added in order.
template <class T>
struct SumGroups {
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerSm = 4;
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr int kMaxGroups = 32;
  static constexpr int kChain = 16;  // rows summed before they are added: a long chain would lose bits

  struct Params {
    const T* x;
    int64_t ld;
    const RowRange* ranges;  // of the first group: positions in `order`
    const int* order;
    int blocks;  // of a group
    GroupSum sum[kMaxGroups];
  };
  struct Shared {
    float sums[kWarps][kWarp];
  };

  static DEVICE void run(const Params& p) {
    const int group = block_index() / p.blocks, warp = thread_index() / kWarp;
    const int column = block_index() % p.blocks * kWarp + lane_index();
    const GroupSum& sum = p.sum[group];
    if (!sum.out) return;
    const Words2 range = load_constant(reinterpret_cast<const Words2*>(p.ranges + group));
    const int end = column < sum.columns ? static_cast<int>(range.v[1]) : 0;
    float total = 0.0f;
    for (int first = static_cast<int>(range.v[0]) + warp; first < end; first += kChain * kWarps) {
      float part = 0.0f;
#pragma unroll
      for (int i = 0; i < kChain; ++i) {
        const int at = first + i * kWarps;
        if (at < end) part += to_float(load_constant(p.x + load_constant(p.order + at) * p.ld + column));
      }
      total += part;
    }
    Shared* shared = shared_memory<Shared>();
    store(&shared->sums[warp][lane_index()], total);
    __syncthreads();
    if (warp != 0 || column >= sum.columns) return;
    total = 0.0f;
#pragma unroll
    for (int other = 0; other < kWarps; ++other) total += load(&shared->sums[other][lane_index()]);
    store(sum.out + column, sum.scale * total);
  }
};

}  // namespace peft_kernels::cuda
