// Runs before a step: the norm of all gradients, and the copy of device tables.
#pragma once

#include "adamw_elements.cuh"

namespace peft_kernels::cuda {

// Computes the factor that limits the total norm of gradients to max_norm. Sums are in fp64; the last block
// to finish adds the blocks' sums in order.
struct ClipFactor {
  static constexpr int kThreads = kStepThreads;
  static constexpr int kBlocksPerSm = 3;

  struct Params {
    Step step;
    Shares shares;
    float max_norm;
    double* sums;  // [blocks]
    float* factor;
    uint32_t* counter;
  };
  struct Shared {
    double by_warp[kStepWarps];
    uint32_t is_last;
  };

  static DEVICE void run(const Params& params) {
    const Step& p = params.step;
    Shared* shared = shared_memory<Shared>();
    const float scale = p.grad_scale ? rounded_reciprocal(load_constant(p.grad_scale)) : 1.0f;
    double sum = 0;
    for_each_tensor(p, params.shares, [&](int i, int begin, int end) {
      const DType dtype = p.tensors[i].dtype;
      const int64_t numel = load(&p.tensors[i].numel);
      const void* grad = p.grads[i];
      for (int block = begin + warp_index(); block < end; block += kStepWarps) {
        const Place at = place(block, numel, is_aligned(grad));
        if (dtype == DType::kF32) {
          sum = add_squares<float>(grad, at, sum);
        } else if (dtype == DType::kBF16) {
          sum = add_squares<bf16>(grad, at, sum);
        } else {
          sum = add_squares<fp16>(grad, at, sum);
        }
      }
    });
    for (int mask = kWarp / 2; mask > 0; mask /= 2) sum = sum + __shfl_xor_sync(kAllLanes, sum, mask);
    const int warp = warp_index();
    if (lane_index() == 0) shared->by_warp[warp] = sum;
    __syncthreads();
    if (thread_index() == 0) {
      double block_sum = 0;
      for (int i = 0; i < kStepWarps; ++i) block_sum = block_sum + shared->by_warp[i];
      params.sums[block_index()] = block_sum;
      shared->is_last = atomic_add_ordered(params.counter, 1) + 1 == static_cast<uint32_t>(grid_size());
    }
    __syncthreads();
    if (shared->is_last == 0 || warp != 0) return;
    double all = 0;
    for (int i = lane_index(); i < grid_size(); i += kWarp) all = all + params.sums[i];
    for (int mask = kWarp / 2; mask > 0; mask /= 2) all = all + __shfl_xor_sync(kAllLanes, all, mask);
    if (lane_index() != 0) return;
    const float norm = static_cast<float>(__dsqrt_rn(all) * scale);
    const float clip = __fdiv_rn(params.max_norm, __fadd_rn(norm, 1e-6f));
    *params.factor = clip >= 1 ? scale : __fmul_rn(scale, clip);
    *params.counter = 0;
  }

 private:
  template <class T>
  static DEVICE double add_squares(const void* grad, const Place& at, double sum) {
    Raw raw;
    at.whole ? load_runs<Bits<T>, true>(grad, at, raw) : load_runs<Bits<T>, false>(grad, at, raw);
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const double g = value_of<T>(raw, i);
      sum = __fma_rn(g, g, sum);
    }
    return sum;
  }
};

struct StoreTable {
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerSm = 1;
  static constexpr int kMost = 496;

  struct Params {
    uint64_t* out;
    int count;
    uint64_t words[kMost];
  };

  static DEVICE void run(const Params& p) {
    for (int i = thread_index(); i < p.count; i += kThreads) p.out[i] = p.words[i];
  }
};

}  // namespace peft_kernels::cuda
