// The midpoints between neighbouring magnitudes of the dynamic maps. The number of midpoints that a value
// exceeds gives its code, so the nearest is found and a tie takes the lower one (ops/optim/adamw.py).
#pragma once

#include "dynamic_map.h"

namespace peft_kernels {

struct DynamicMidpoints {
  float value[nf4::kDynamicCodes];  // infinity after the last
};

constexpr DynamicMidpoints midpoints_of(const float* magnitudes, int count) {
  DynamicMidpoints out{};
  for (int i = 0; i < nf4::kDynamicCodes; ++i) {
    out.value[i] = i + 1 < count ? (magnitudes[i] + magnitudes[i + 1]) * 0.5f : __builtin_inff();
  }
  return out;
}
inline constexpr int kSignedZero = 127;
inline constexpr DynamicMidpoints kSignedMidpoints =
    midpoints_of(nf4::kDynamicMap + kSignedZero, nf4::kDynamicCodes - kSignedZero);
inline constexpr DynamicMidpoints kUnsignedMidpoints = midpoints_of(kUnsignedDynamicMap, nf4::kDynamicCodes);

}  // namespace peft_kernels
