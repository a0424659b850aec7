// Dropout, as peft_kernels/ops/lora/dropout.py has it.
#pragma once

#include "../core/device.cuh"
#include "../core/kernels.h"

namespace peft_kernels::cuda {

// Philox4x32-10 (Salmon et al. 2011): the words of elements 4 block .. 4 block + 3. `last` is the counter's
// last word.
DEVICE Words4 philox(int64_t block, uint64_t seed, uint32_t stream, uint32_t last = 0) {
  constexpr uint32_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;
  constexpr uint32_t kWeyl0 = 0x9E3779B9u, kWeyl1 = 0xBB67AE85u;
  constexpr int kRounds = 10;
  uint32_t c0 = static_cast<uint32_t>(block), c1 = static_cast<uint32_t>(block >> 32), c2 = stream, c3 = last;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
#pragma unroll
  for (int round = 0; round < kRounds; ++round) {
    const uint64_t p0 = uint64_t{c0} * kMultiplier0, p1 = uint64_t{c2} * kMultiplier1;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += kWeyl0;
    k1 += kWeyl1;
  }
  return {{c0, c1, c2, c3}};
}

// A thread has the four elements that one block of Philox decides about, as far as they are among those from
// `first` on.
template <class T, bool kVector>
struct Dropout4 {
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerSm = 4;
  static constexpr int kElements = 4;

  struct Params {
    const T* x;
    T* out;
    int64_t first, end;  // elements of the whole, of which x and out are a part
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
  // A product, so that a NaN stays one.
  static DEVICE T masked(const DropoutMask& mask, uint32_t word, T x) {
    return from_float<T>(__fmul_rn(to_float(x), word >= mask.threshold ? mask.scale : 0.0f));
  }
};

}  // namespace peft_kernels::cuda
