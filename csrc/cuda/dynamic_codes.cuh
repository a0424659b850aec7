// Codes of the dynamic maps of optimizers' moments: how many midpoints between neighbours a number exceeds,
// so that the nearest code is found and a tie takes the lower one (peft_kernels/ops/adamw.py).
//
// A map's magnitudes are 0, seven decades of evenly spaced values, and 1: nine segments, and no binade has
// more than one border between two. So the exponent and one comparison tell the segment, a multiplication the
// midpoint that is nearest, and a comparison with that decides. A lookup is of 32 entries at most, which
// lanes read at once, but for the midpoint's.
#pragma once

#include "../common/dynamic_map.h"
#include "nf4_tables.cuh"

namespace peft_kernels::cuda {

DEVICE_TABLE Table<nf4::kDynamicCodes> kUnsignedDynamicTable(kUnsignedDynamicMap);

struct DynamicSearch {
  static constexpr int kFirstExponent = -24, kBinades = 32, kSegments = 16;
  struct Binade {
    float border;      // where the next segment begins, within the binade; infinity: nowhere
    uint32_t segment;  // of the binade's beginning
  };
  // slope * x + start is an integer at midpoints; above `last` it counts as that, between the last two.
  struct Segment {
    float slope, start, last, unused;
  };
  Binade binades[kBinades];
  Segment segments[kSegments];
  float midpoints[nf4::kDynamicCodes];  // the last one is out of reach

  // `values`: the magnitudes, `count` of them; decade d has first_size * 2^d.
  constexpr DynamicSearch(const float* values, int count, int first_size)
      : binades{}, segments{}, midpoints{} {
    constexpr float kInfinity = __builtin_inff();
    for (int i = 0; i < nf4::kDynamicCodes; ++i) {
      midpoints[i] = i + 1 < count ? (values[i] + values[i + 1]) * 0.5f : kInfinity;
    }
    float borders[8] = {};
    int code = 1, size = first_size;
    double scale = 1e-6;
    segments[0].start = segments[0].last = 0.5f;
    for (int d = 0; d < 7; ++d) {
      borders[d] = midpoints[code - 1];
      segments[d + 1].slope = static_cast<float>(size / (0.9 * scale));
      segments[d + 1].start = static_cast<float>(code - size / 9.0);
      code += size;
      segments[d + 1].last = code - 0.5f;
      size *= 2;
      scale *= 10;
    }
    borders[7] = midpoints[code - 1];
    segments[8].start = segments[8].last = code + 0.5f;
    double low = 1;
    for (int e = 0; e > kFirstExponent; --e) low *= 0.5;
    int passed = 0;
    for (int b = 0; b < kBinades; ++b, low *= 2) {
      const bool has_border = passed < 8 && static_cast<double>(borders[passed]) < 2 * low;
      binades[b] = {has_border ? borders[passed] : kInfinity, static_cast<uint32_t>(passed)};
      passed += has_border;
    }
  }
};

inline constexpr int kSignedZero = 127;
DEVICE_TABLE DynamicSearch kSignedSearch(nf4::kDynamicMap + kSignedZero, nf4::kDynamicCodes - kSignedZero, 1);
DEVICE_TABLE DynamicSearch kUnsignedSearch(kUnsignedDynamicMap, nf4::kDynamicCodes, 2);

// In shared memory: the map, and what finds codes.
struct DynamicCodes {
  float map[nf4::kDynamicCodes];
  alignas(16) DynamicSearch::Segment segments[DynamicSearch::kSegments];
  DynamicSearch::Binade binades[DynamicSearch::kBinades];
  float midpoints[nf4::kDynamicCodes];

  // For all threads of a block; a barrier must follow.
  template <bool kSigned, int kThreads>
  DEVICE void fill() {
    const DynamicSearch& search = kSigned ? kSignedSearch : kUnsignedSearch;
    for (int i = thread_index(); i < nf4::kDynamicCodes; i += kThreads) {
      map[i] = kSigned ? kDynamicTable.value[i] : kUnsignedDynamicTable.value[i];
      midpoints[i] = search.midpoints[i];
      if (i < DynamicSearch::kBinades) binades[i] = search.binades[i];
      if (i < DynamicSearch::kSegments) segments[i] = search.segments[i];
    }
  }

  // How many midpoints x exceeds; x >= 0, finite.
  DEVICE int count(float x) const {
    constexpr int kBias = 127 + DynamicSearch::kFirstExponent;
    const int exponent = bit_cast<int>(x) >> 23, binade = exponent > kBias ? exponent - kBias : 0;
    const auto at = load(&binades[binade]);
    const auto segment = load(&segments[at.segment + (x > at.border)]);
    // Within 1e-4 for all rounding, and a midpoint at 0.5 is as good as its neighbours.
    const int nearest = __float2int_rn(fminf(__fmaf_rn(x, segment.slope, segment.start), segment.last));
    const int below = nearest > 1 ? nearest - 1 : 0;
    return below + (x > load(&midpoints[below]));
  }

  DEVICE uint32_t unsigned_code(float x) const { return count(x); }
  // Below zero a tie takes the code farther from it: the midpoint itself has to count, and what is next to it
  // does.
  DEVICE uint32_t signed_code(float x) const {
    const uint32_t bits = bit_cast<uint32_t>(x), negative = bits >> 31;
    const int counted = count(bit_cast<float>((bits & 0x7fffffff) + negative));
    return negative ? kSignedZero - (counted < kSignedZero ? counted : kSignedZero) : kSignedZero + counted;
  }
};

}  // namespace peft_kernels::cuda
