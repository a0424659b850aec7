// How codes of the dynamic maps are found: how many midpoints between neighbours a number exceeds, so that
// the nearest code is found and a tie takes the lower one (ops/adamw.py).
//
// A map's magnitudes are 0, seven decades of evenly spaced values, and 1: nine segments, and no binade has
// more than one border between two. So the exponent and one comparison tell the segment, and a multiplication
// where among its codes the number is, to 1e-4 of the distance of two; the midpoints decide what is that near
// to one.
#pragma once

#include "dynamic_map.h"

namespace peft_kernels {

struct DynamicSearch {
  static constexpr int kFirstExponent = -24, kBinades = 32, kSegments = 16;
  float border[kBinades];     // where the next segment begins, within the binade; infinity: nowhere
  int32_t segment[kBinades];  // of the binade's beginning
  float slope[kSegments];     // code = slope * x + start, cut off,
  float start[kSegments];     // and not above `last`, which is the segment's last code and a half
  float last[kSegments];
  float midpoints[nf4::kDynamicCodes];  // the last one is out of reach
};

// `values`: the magnitudes, `count` of them; decade d has first_size * 2^d.
constexpr DynamicSearch make_dynamic_search(const float* values, int count, int first_size) {
  DynamicSearch out{};
  constexpr float kInfinity = __builtin_inff();
  for (int i = 0; i < nf4::kDynamicCodes; ++i) {
    out.midpoints[i] = i + 1 < count ? (values[i] + values[i + 1]) * 0.5f : kInfinity;
  }
  float borders[8] = {};
  int code = 1, size = first_size;
  double scale = 1e-6;
  out.start[0] = out.last[0] = 0.5f;
  for (int d = 0; d < 7; ++d) {
    borders[d] = out.midpoints[code - 1];
    out.slope[d + 1] = static_cast<float>(size / (0.9 * scale));
    out.start[d + 1] = static_cast<float>(code - size / 9.0);
    code += size;
    out.last[d + 1] = code - 0.5f;
    size *= 2;
    scale *= 10;
  }
  borders[7] = out.midpoints[code - 1];
  out.start[8] = out.last[8] = code + 0.5f;
  double low = 1;
  for (int e = 0; e > DynamicSearch::kFirstExponent; --e) low *= 0.5;
  int passed = 0;
  for (int b = 0; b < DynamicSearch::kBinades; ++b, low *= 2) {
    out.segment[b] = passed;
    const bool has_border = passed < 8 && static_cast<double>(borders[passed]) < 2 * low;
    out.border[b] = has_border ? borders[passed] : kInfinity;
    passed += has_border;
  }
  return out;
}
inline constexpr int kSignedZero = 127;
inline constexpr DynamicSearch kSignedSearch =
    make_dynamic_search(nf4::kDynamicMap + kSignedZero, nf4::kDynamicCodes - kSignedZero, 1);
inline constexpr DynamicSearch kUnsignedSearch =
    make_dynamic_search(kUnsignedDynamicMap, nf4::kDynamicCodes, 2);
static_assert(kSignedSearch.last[8] == 128.5f && kUnsignedSearch.last[8] == 255.5f, "");
static_assert(kSignedSearch.segment[31] == 8 && kUnsignedSearch.segment[31] == 8, "");

}  // namespace peft_kernels
