// Sums whose terms are split over several blocks.
#pragma once

#include "kernels.h"
#include "launch.cuh"

namespace peft_kernels::cuda {

// ---- In the same launch -------------------------------------------------------------------------------

// Each block writes its partial sums of a tile, and the last block to arrive adds them in block order, so
// that the result does not depend on which block that was.

// Whether this block is the last of `blocks` to arrive. Called by all threads after they wrote their partial
// sums. The tile's counter is zero before and after; `last` is a word of shared memory.
DEVICE bool is_last_of_tile(uint32_t* counter, int blocks, uint32_t* last) {
  __syncthreads();
  if (thread_index() == 0) {
    const uint32_t before = atomic_add_ordered(counter, 1);
    const bool is_last = before + 1 == static_cast<uint32_t>(blocks);
    if (is_last) store(counter, 0u);
    store(last, uint32_t{is_last});
  }
  __syncthreads();
  return load(last) != 0;
}

// ---- In a second launch -------------------------------------------------------------------------------

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

// out[count] = the sum of the splits that `parts` writes to its argument [splits, count]: `out` itself if
// there is one split, else the workspace.
template <class Parts>
void sum_splits(int splits, int64_t count, float* out, Context& context, const Parts& parts) {
  if (splits == 1) return parts(out);
  auto* partial = static_cast<float*>(context.workspace(splits * count * int64_t{sizeof(float)}));
  parts(partial);
  launch<SumSplits>({partial, splits, count, out}, ceil_div(count, SumSplits::kThreads), context.stream);
}

}  // namespace peft_kernels::cuda
