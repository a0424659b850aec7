// Tables by which vectors decode and find codes of the dynamic maps.
//
// A map's magnitudes are 0, seven decades of evenly spaced values, and 1. Decade p (from 1 to 7) covers s /
// 10 to s with 2^(p - 1) codes in the signed map, 2^p in the unsigned one. With y = x / (0.9 s) + 8 / 9,
// which runs from 1 to 2, a magnitude's index is 2^(p - 1) y, or 2^p y - 1: so p is added to the exponent of
// y. Adding a power of two puts the result in fixed point, with the code in a byte of its own and the
// fraction below it. Rounding is monotonic, so checking its effect at the midpoints, where codes change,
// bounds its effect in between.
#pragma once

#include "../../common/dynamic_midpoints.h"

namespace peft_kernels::cpu {

inline constexpr int kCodeRun = 64;  // codes decoded, or found, at a time

struct CodeSearch {
  static constexpr float kLeast = 0x1p-24f;
  static constexpr int kLeastExponent = 127 - 24;
  static constexpr float kMargin = 2.0f;  // in fractions; with it a midpoint has a fraction of 0 to 7

  float thresholds[8];  // between decades: x > p of them means decade p; 0 and 8 are out of range
  float second[8],
      third[8];        // the same, as a binary search reads them: indexed by the result of the previous steps
  float border[32];    // by the exponent's low five bits: the threshold in that binade, or infinity
  int32_t before[32];  // and the number of thresholds below it, in the exponent's bits and in the lowest
  float slope[16];     // dy/dx in a decade, indexed by the thresholds passed, or by that modulo 8
  float first;         // y at x = 0; for signed codes this and the slopes are halved
  float limit;         // upper bound of y: less than half a code below 2
  float base;          // added to shift into fixed point
  float least;         // lower bound of the sum: code 0
  float floors[nf4::kDynamicCodes + 1];  // code c is for x > floors[c]; -1 for 0
};

constexpr CodeSearch make_code_search(const DynamicMidpoints& midpoints, bool is_signed) {
  CodeSearch out{};
  for (int p = 1; p <= 8; ++p) {
    const int first_code = is_signed ? 1 << (p - 1) : (1 << p) - 1;
    out.thresholds[p - 1] = midpoints.value[first_code - 1];
  }
  int passed = 0;
  double binade = CodeSearch::kLeast;
  for (int exponent = CodeSearch::kLeastExponent; exponent < CodeSearch::kLeastExponent + 32;
       ++exponent, binade *= 2) {
    const bool has_border = passed < 8 && static_cast<double>(out.thresholds[passed]) < 2 * binade;
    out.border[exponent % 32] = has_border ? out.thresholds[passed] : __builtin_inff();
    out.before[exponent % 32] = passed << 23 | passed;
    passed += has_border;
  }
  for (int i = 0; i < 8; ++i) {
    out.second[i] = out.thresholds[i % 2 ? 5 : 1];
    out.third[i] = out.thresholds[i % 4 * 2];
  }
  const double half = is_signed ? 0.5 : 1;
  double scale = 1e-6;
  for (int p = 1; p < 8; ++p, scale *= 10) {
    out.slope[p] = out.slope[p + 8] = static_cast<float>(half / (0.9 * scale));
  }
  out.slope[0] = out.slope[8] = static_cast<float>(half * (1.001 - 8 / 9.0));
  out.first = static_cast<float>(half * 8 / 9);
  out.limit = static_cast<float>(half * (2 - 0x1p-10));
  // For signed codes bits 16 and up are the code, for unsigned ones after a shift by one.
  out.base = is_signed ? 128 + CodeSearch::kMargin / 65536 : 255 + CodeSearch::kMargin / 32768;
  out.least = is_signed ? 128 : 256.5f;
  out.floors[0] = -1;
  for (int c = 0; c < nf4::kDynamicCodes; ++c) out.floors[c + 1] = midpoints.value[c];
  return out;
}
inline constexpr CodeSearch kSignedCodes = make_code_search(kSignedMidpoints, true);
inline constexpr CodeSearch kUnsignedCodes = make_code_search(kUnsignedMidpoints, false);
constexpr int kBeyond = (CodeSearch::kLeastExponent + 31) % 32;
static_assert((kSignedCodes.before[kBeyond] & 15) == 8 && (kUnsignedCodes.before[kBeyond] & 15) == 8,
              "a binade has two thresholds");
// Whether fractions are in the documented range where a code starts (one code is 2^15 or 2^16 fractions): for
// a fused and for a rounded multiply-add, and with p in the last bits of y.
constexpr bool has_margins(const CodeSearch& search, bool is_signed) {
  const float units = is_signed ? 65536 : 32768, zero = is_signed ? 128 : 256;
  int p = 0;
  for (int code = 1; code < nf4::kDynamicCodes && p < 8; ++code) {
    const float midpoint = search.floors[code], next = midpoint * (1 + 0x1p-22f);
    if (midpoint == search.thresholds[p]) {
      ++p;  // found by comparison
      continue;
    }
    for (int variant = 0; variant < 8; ++variant) {
      const float x = variant & 1 ? next : midpoint;
      const double exact = double{x} * search.slope[p] + search.first;
      const float product = x * search.slope[p], rounded = product + search.first;
      float y = variant & 2 ? static_cast<float>(exact) : rounded;
      if (variant & 4) y += static_cast<float>(p) / (is_signed ? 1 << 24 : 1 << 23);
      const float fraction = (y * (1 << p) + search.base - zero - code) * units;
      if (fraction < 0 || (x == midpoint && fraction >= 8)) return false;
    }
  }
  return p == 8;
}
static_assert(has_margins(kSignedCodes, true) && has_margins(kUnsignedCodes, false), "codes may be wrong");

}  // namespace peft_kernels::cpu
