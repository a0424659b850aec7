// How matrix instructions add up.
//
// Products are exact. Sums are rounded to nearest, in ascending k; with Options::truncate_sums they are
// computed as by tensor cores (Fasi, Higham, Mikaitis, Pranesh: Numerical behavior of NVIDIA tensor cores,
// 2021): a few products and the accumulator are aligned to their largest exponent, truncated one or two bits
// below a float's precision, added exactly, and truncated again. sm_80 adds 8 products of 16-bit values or 4
// of tf32 at once and keeps one extra bit; later architectures add twice as many and keep two.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "numbers.h"

namespace ptx {

inline float multiply_add(float a, float b, float c) {
#ifdef __FMA__
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

inline int exponent_of(float x) {
  return std::max(static_cast<int>(bits_as<uint32_t>(x) >> 23 & 0xff), 1) - 127;
}

inline double power_of_two(int exponent) {
  return bits_as<double>(static_cast<uint64_t>(exponent + 1023) << 52);
}

// The sum of c and `count` products as computed by a tensor core.
inline float truncated_sum(float c, const float* a, const float* b, int b_stride, int count, int extra_bits) {
  constexpr int kFraction = 23;
  int most = c != 0 ? exponent_of(c) : INT32_MIN / 2;
  bool finite = std::isfinite(c);
  for (int k = 0; k < count; ++k) {
    const float x = a[k], y = b[k * b_stride];
    finite = finite && std::isfinite(x) && std::isfinite(y);
    if (x != 0 && y != 0) most = std::max(most, exponent_of(x) + exponent_of(y));
  }
  if (!finite) {
    for (int k = 0; k < count; ++k) c += a[k] * b[k * b_stride];
    return c;
  }
  if (most == INT32_MIN / 2) return c;
  const int last = most - kFraction - extra_bits;
  const double scale = power_of_two(-last);
  double sum = std::trunc(c * scale);
  for (int k = 0; k < count; ++k) sum += std::trunc(static_cast<double>(a[k]) * b[k * b_stride] * scale);
  const double exact = sum * power_of_two(last);
  const auto rounded = static_cast<float>(exact);
  return std::fabs(static_cast<double>(rounded)) > std::fabs(exact) ? std::nextafter(rounded, 0.0f) : rounded;
}

}  // namespace ptx
