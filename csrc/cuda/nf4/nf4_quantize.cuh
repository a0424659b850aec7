// Quantises weights to NF4 and absmax to 8 bits (double quantisation), bit-equal to peft_kernels/ops/nf4.
#pragma once

#include <cfloat>

#include "nf4_tables.cuh"

namespace peft_kernels::cuda {

// Bits in the order of |x|, with Inf and then NaN on top.
DEVICE uint32_t abs_bits(float x) { return bit_cast<uint32_t>(x) & 0x7fffffff; }
DEVICE uint32_t max_of(uint32_t a, uint32_t b) { return a > b ? a : b; }

// The maximum over every run of `threads` threads, a power of two and at least 2. Called by all threads of
// the block.
template <int kThreads>
DEVICE uint32_t max_of_run(uint32_t value, int threads, uint32_t (&by_warp)[kThreads / kWarp]) {
  for (int mask = 1; mask < threads && mask < kWarp; mask *= 2) {
    value = max_of(value, __shfl_xor_sync(kAllLanes, value, mask));
  }
  if (threads <= kWarp) return value;
  const int warps = threads / kWarp, warp = warp_index();
  if (lane_index() == 0) store(&by_warp[warp], value);
  __syncthreads();
  for (int i = 0; i < warps; ++i) value = max_of(value, load(&by_warp[(warp & -warps) + i]));
  return value;
}

// 0 if absmax is zero or too small to invert, which gives every element the code of 0.0.
DEVICE float usable_inverse(float absmax) {
  const float inverse = __fdiv_rn(1.0f, absmax);
  return inverse > FLT_MAX ? 0.0f : inverse;
}

template <class T>
struct QuantizeNf4 {
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerSm = 4;
  static constexpr int kRun = 16;  // elements of a thread: 2 threads per block of 32, all 256 for one of 4096
  static_assert(kRun * kThreads == nf4::kMaxBlocksize && 2 * kRun == nf4::kMinBlocksize);

  struct Params {
    const T* weight;
    bool is_aligned;  // whether weight is 16-byte aligned
    int64_t numel;
    int block_shift;
    uint8_t* packed;  // 8-byte aligned
    float* absmax;
  };
  struct Shared {
    uint32_t by_warp[kThreads / kWarp];
  };

  static DEVICE void run(const Params& p) {
    const int64_t first = (int64_t{block_index()} * kThreads + thread_index()) * kRun;
    const int64_t left = p.numel - first;
    const int count = left < 0 ? 0 : left < kRun ? static_cast<int>(left) : kRun;
    float x[kRun] = {};
    load_run(p, first, count, x);

    uint32_t max_bits = 0;
#pragma unroll
    for (int i = 0; i < kRun; ++i) max_bits = max_of(max_bits, abs_bits(x[i]));
    const int threads = (1 << p.block_shift) / kRun;
    max_bits = max_of_run<kThreads>(max_bits, threads, shared_memory<Shared>()->by_warp);
    const float absmax = bit_cast<float>(max_bits), inverse = usable_inverse(absmax);
    if (count > 0 && (thread_index() & (threads - 1)) == 0)
      store(p.absmax + (first >> p.block_shift), absmax);

    Words2 bytes{};
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      const uint32_t code = i < count ? code_of(__fmul_rn(x[i], inverse)) : nf4::kZeroCode;
      bytes.v[i / 8] |= code << (i % 8 / 2 * 8 + (i % 2 ? 0 : 4));
    }
    uint8_t* out = p.packed + first / 2;
    if (count == kRun) {
      store(reinterpret_cast<Words2*>(out), bytes);
    } else {
#pragma unroll
      for (int i = 0; i < kRun / 2; ++i) {
        if (2 * i < count) store(out + i, static_cast<uint8_t>(bytes.v[i / 4] >> (i % 4 * 8)));
      }
    }
  }

 private:
  static DEVICE void load_run(const Params& p, int64_t first, int count, float (&x)[kRun]) {
    constexpr int kPart = 16 / sizeof(T);
    if (p.is_aligned && count == kRun) {
#pragma unroll
      for (int i = 0; i < kRun / kPart; ++i) {
        const auto part = load_once(reinterpret_cast<const Vec<T, kPart>*>(p.weight + first) + i);
#pragma unroll
        for (int j = 0; j < kPart; ++j) x[i * kPart + j] = to_float(part.v[j]);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        if (i < count) x[i] = to_float(load_constant(p.weight + first + i));
      }
    }
  }

  // The number of thresholds t with x > t, strictly; 0 for NaN.
  static DEVICE uint32_t code_of(float x) {
    uint32_t code = 0;
#pragma unroll
    for (int i = 0; i + 1 < nf4::kCodes; ++i) code += x > kThresholdTable.value[i];
    return code;
  }
};

// One block of threads per group of absmax values.
struct QuantizeAbsmax {
  static constexpr int kThreads = nf4::kAbsmaxBlock;
  static constexpr int kBlocksPerSm = 4;

  struct Params {
    const float* absmax;
    int64_t blocks;
    const float* offset;
    uint8_t* q8;
    float* absmax2;
  };
  struct Shared {
    uint32_t by_warp[kThreads / kWarp];
    float midpoints[nf4::kDynamicCodes - 1];
  };

  static DEVICE void run(const Params& p) {
    Shared* shared = shared_memory<Shared>();
    const int thread = thread_index();
    if (thread + 1 < nf4::kDynamicCodes) {
      const float sum = __fadd_rn(kDynamicTable.value[thread], kDynamicTable.value[thread + 1]);
      store(&shared->midpoints[thread], __fmul_rn(sum, 0.5f));
    }
    const int64_t i = int64_t{block_index()} * kThreads + thread;
    float x = 0.0f;
    if (i < p.blocks) x = __fadd_rn(load_constant(p.absmax + i), -load_constant(p.offset));
    const uint32_t max_bits = max_of_run<kThreads>(abs_bits(x), kThreads, shared->by_warp);
    const float absmax2 = bit_cast<float>(max_bits), inverse = usable_inverse(absmax2);
    if (thread == 0) store(p.absmax2 + block_index(), absmax2);
    if (i < p.blocks) store(p.q8 + i, code_of(shared->midpoints, __fmul_rn(x, inverse)));
  }

 private:
  // The number of midpoints m with x > m, strictly: the nearest map entry, the lower one on a tie.
  static DEVICE uint8_t code_of(const float* midpoints, float x) {
    int code = 0;
    for (int step = nf4::kDynamicCodes / 2; step > 0; step /= 2) {
      if (x > load(midpoints + code + step - 1)) code += step;
    }
    return static_cast<uint8_t>(code);
  }
};

}  // namespace peft_kernels::cuda
