// A hash of a tensor's bits. One pass over the memory, where torch takes eight.
#pragma once

#include "device.cuh"

namespace peft_kernels::cuda {

// Constants of splitmix64.
inline constexpr uint64_t kHashStep = 0x9e3779b97f4a7c15, kHashMix1 = 0xbf58476d1ce4e5b9,
                          kHashMix2 = 0x94d049bb133111eb;

struct BitsHash {
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerSm = 4;
  static constexpr int kWarps = kThreads / kWarp;

  struct Params {
    const int64_t* words;
    int64_t count;
    int64_t* sums;  // one per block
  };
  struct Shared {
    uint64_t sums[kWarps];
  };

  static DEVICE void run(const Params& p) {
    const int64_t step = int64_t{grid_size()} * kThreads;
    uint64_t sum = 0;  // modulo 2^64, so the order does not matter
#pragma unroll 4
    for (int64_t i = int64_t{block_index()} * kThreads + thread_index(); i < p.count; i += step) {
      sum += mixed(static_cast<uint64_t>(load_constant(p.words + i)), static_cast<uint64_t>(i));
    }
    Shared& shared = *shared_memory<Shared>();
    const int warp = warp_index();
    sum = across_warp(sum);
    if (lane_index() == 0) shared.sums[warp] = sum;
    __syncthreads();
    if (thread_index() != 0) return;
    sum = 0;
    for (int i = 0; i < kWarps; ++i) sum += shared.sums[i];
    p.sums[block_index()] = static_cast<int64_t>(sum);
  }

 private:
  static DEVICE uint64_t mixed(uint64_t word, uint64_t index) {
    uint64_t m = (word ^ (index * kHashStep)) * kHashMix1;
    m = (m ^ static_cast<uint64_t>(static_cast<int64_t>(m) >> 29)) * kHashMix2;
    return m ^ static_cast<uint64_t>(static_cast<int64_t>(m) >> 32);
  }
  static DEVICE uint64_t across_warp(uint64_t sum) {
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) sum += __shfl_xor_sync(kAllLanes, sum, step);
    return sum;
  }
};

}  // namespace peft_kernels::cuda
