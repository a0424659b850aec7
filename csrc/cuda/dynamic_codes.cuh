// Codes of the dynamic maps of optimizers' moments, by common/dynamic_search.h: the multiplication tells the
// midpoint that is nearest, and a comparison with that decides. A lookup is of 32 entries at most, which
// lanes read at once, but for the midpoint's.
#pragma once

#include "../common/dynamic_search.h"
#include "nf4_tables.cuh"

namespace peft_kernels::cuda {

DEVICE_TABLE Table<nf4::kDynamicCodes> kUnsignedDynamicTable(kUnsignedDynamicMap);

DEVICE_TABLE DynamicSearch kSignedSearchTable = kSignedSearch;
DEVICE_TABLE DynamicSearch kUnsignedSearchTable = kUnsignedSearch;

// In shared memory: the map, and what finds codes.
struct DynamicCodes {
  // What is looked up together lies together.
  struct Binade {
    float border;
    uint32_t segment;
  };
  struct Segment {
    float slope, start, last, unused;
  };
  float map[nf4::kDynamicCodes];
  alignas(16) Segment segments[DynamicSearch::kSegments];
  Binade binades[DynamicSearch::kBinades];
  float midpoints[nf4::kDynamicCodes];

  // For all threads of a block; a barrier must follow.
  template <bool kSigned, int kThreads>
  DEVICE void fill() {
    const DynamicSearch& search = kSigned ? kSignedSearchTable : kUnsignedSearchTable;
    for (int i = thread_index(); i < nf4::kDynamicCodes; i += kThreads) {
      map[i] = kSigned ? kDynamicTable.value[i] : kUnsignedDynamicTable.value[i];
      midpoints[i] = search.midpoints[i];
      if (i < DynamicSearch::kBinades)
        binades[i] = {search.border[i], static_cast<uint32_t>(search.segment[i])};
      if (i < DynamicSearch::kSegments)
        segments[i] = {search.slope[i], search.start[i], search.last[i], 0.0f};
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
