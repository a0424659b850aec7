// Dropout, as peft_kernels/ops/lora/dropout.py has it.
#pragma once

#include "../core/philox.cuh"
#include "dropout.h"

namespace peft_kernels::cuda {

// A thread has the four elements of one block of Philox, if they are in [first, end).
template <class T, bool kVector>
struct Dropout4 {
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerSm = 4;
  static constexpr int kElements = 4;

  struct Params {
    const T* x;
    T* out;
    int64_t first, end;  // elements of the whole activations, a slice of which x and out are
    DropoutMask mask;
  };

  static DEVICE void run(const Params& p) {
    const int64_t block = p.first / kElements + int64_t{block_index()} * kThreads + thread_index();
    const int64_t begin = block * kElements;
    if (begin >= p.end) return;
    const Words4 words = philox(block, static_cast<uint64_t>(load_constant(p.mask.seed)), p.mask.stream);
    using Four = Vec<T, kElements>;
    if (kVector && begin + kElements <= p.end) {
      const int64_t at = begin - p.first;
      Four four = load_constant(reinterpret_cast<const Four*>(p.x + at));
#pragma unroll
      for (int i = 0; i < kElements; ++i) four.v[i] = masked(p.mask, words.v[i], four.v[i]);
      store(reinterpret_cast<Four*>(p.out + at), four);
    } else {
#pragma unroll
      for (int i = 0; i < kElements; ++i) {
        const int64_t at = begin + i - p.first;
        if (at < 0 || begin + i >= p.end) continue;
        store(p.out + at, masked(p.mask, words.v[i], load_constant(p.x + at)));
      }
    }
  }

 private:
  // Multiplied, so that a NaN stays one.
  static DEVICE T masked(const DropoutMask& mask, uint32_t word, T x) {
    return from_float<T>(__fmul_rn(to_float(x), word >= mask.threshold ? mask.scale : 0.0f));
  }
};

}  // namespace peft_kernels::cuda
