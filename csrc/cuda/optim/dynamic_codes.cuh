// Encodes optimizer moments with the dynamic maps: the nearest code, on a tie the lower (ops/optim).
//
// Values are looked up by exponent and leading mantissa bits, in bins so narrow that none contains more than
// one midpoint of neighbouring codes. A bin's word has the code in its upper byte, and below it an addend
// with which a mantissa above the midpoint overflows into the code: one lookup and one addition.
#pragma once

#include "../../common/dynamic_midpoints.h"
#include "../nf4/nf4_tables.cuh"
#include "adamw_elements.cuh"

namespace peft_kernels::cuda {

DEVICE_TABLE Table<nf4::kDynamicCodes> kSecondMomentTable(kSecondMoments.value);

// The bins of [0, 2): binades from 2^kLowest on, below which all is 0, and the bin that starts at 1. For the
// signed map the bins of negative values follow, indexed by the complement of their mantissas.
template <bool kSigned>
struct alignas(16) DynamicBins {
  static constexpr int kBits = kSigned ? 6 : 7, kLowest = kSigned ? -22 : -23;
  static constexpr int kSide = (-kLowest << kBits) + 1, kCount = (kSigned ? 2 * kSide : kSide) + 3 & ~3;
  static constexpr int kShift = 23 - kBits, kFirst = (127 + kLowest) << kBits;
  static constexpr uint32_t kMantissa = (1u << 23) - 1;

  uint32_t word[kCount] = {};

  constexpr DynamicBins() {
    if (kSigned) fill(kSide, kSignedMidpoints.value, true);
    fill(0, kSigned ? kSignedMidpoints.value : kUnsignedMidpoints.value, false);
  }

 private:
  constexpr void fill(int first, const float* midpoints, bool is_negative) {
    double binade = 1;
    for (int e = 0; e > kLowest; --e) binade /= 2;
    int passed = 0;
    const int most = is_negative ? kSignedZero : nf4::kDynamicCodes;
    for (int i = 0; i < kSide; ++i) {
      const int part = i & ((1 << kBits) - 1);
      if (i > 0 && part == 0) binade *= 2;
      const double end = binade * (1 + (part + 1.0) / (1 << kBits));
      const bool has_midpoint = passed < most && static_cast<double>(midpoints[passed]) < end;
      const uint32_t mantissa =
          has_midpoint ? static_cast<uint32_t>((midpoints[passed] / binade - 1) * (kMantissa + 1)) : 0;
      const int code = is_negative ? kSignedZero - passed : (kSigned ? kSignedZero : 0) + passed;
      uint32_t& out = word[first + i];
      if (!has_midpoint) {
        out = static_cast<uint32_t>(code) << 24;
      } else if (is_negative) {
        out = (static_cast<uint32_t>(code - 1) << 24) + 2 * mantissa;
      } else {
        out = (static_cast<uint32_t>(code) << 24) + 2 * (kMantissa - mantissa);
      }
      const uint32_t exponent = static_cast<uint32_t>(kFirst + i) << kShift & ~kMantissa;
      out -= 2 * (is_negative ? ~exponent & ~kMantissa : exponent);
      passed += has_midpoint;
    }
  }
};

// Not in constant memory, which serialises lanes that read different addresses.
[[maybe_unused]] static __device__ const DynamicBins<true> kSignedBins;
[[maybe_unused]] static __device__ const DynamicBins<false> kUnsignedBins;

// In shared memory: the map and the bins.
template <bool kSigned>
struct DynamicCodes {
  using Bins = DynamicBins<kSigned>;
  float map[nf4::kDynamicCodes];
  Bins bins;

  // For all threads of a block; a barrier must follow.
  template <int kThreads>
  DEVICE void fill() {
    const uint32_t* from = kSigned ? kSignedBins.word : kUnsignedBins.word;
    for (int i = 4 * thread_index(); i < Bins::kCount; i += 4 * kThreads) {
      store(reinterpret_cast<Words4*>(bins.word + i),
            load_constant(reinterpret_cast<const Words4*>(from + i)));
    }
    for (int i = thread_index(); i < nf4::kDynamicCodes; i += kThreads) {
      map[i] = kSigned ? kDynamicTable.value[i] : kSecondMomentTable.value[i];
    }
  }

  // Decodes a lane's codes and multiplies by their absmax.
  DEVICE void decode(const Raw& codes, float absmax, float (&out)[kMine]) const {
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const uint32_t code = codes.v[i / kRun].v[0] >> (8 * (i % kRun)) & 0xff;
      out[i] = __fmul_rn(load(map + code), absmax);
    }
  }
  // Encodes x * inverse, of magnitude below 2.
  DEVICE void encode(const float (&x)[kMine], float inverse, Raw& codes) const {
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      uint32_t found[kRun];
#pragma unroll
      for (int i = 0; i < kRun; ++i) found[i] = in_upper_byte(__fmul_rn(x[run * kRun + i], inverse));
      const uint32_t low = __byte_perm(found[0], found[1], 0x73);
      const uint32_t high = __byte_perm(found[2], found[3], 0x73);
      codes.v[run].v[0] = __byte_perm(low, high, 0x5410);
    }
  }

 private:
  // The code of x in the upper byte; the lower bits are meaningless.
  DEVICE uint32_t in_upper_byte(float x) const {
    constexpr float kLeast = kSigned ? 0x1p-22f : 0x1p-23f;
    const int sign = kSigned ? bit_cast<int>(x) >> 31 : 0;
    const int bits = bit_cast<int>(fmaxf(kSigned ? fabsf(x) : x, kLeast));
    const int bin = (bits >> Bins::kShift) + (sign & Bins::kSide);
    return load(bins.word + bin - Bins::kFirst) + 2 * static_cast<uint32_t>(bits ^ sign);
  }
};

}  // namespace peft_kernels::cuda
