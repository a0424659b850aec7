// 16-bit floats, and rounding of exact results.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace ptx {

template <class To, class From>
To bits_as(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(To));
  return to;
}

struct Bf16 {
  static float widen(uint16_t x) { return bits_as<float>(uint32_t{x} << 16); }
  // Rounds to nearest, ties to even; a NaN becomes 0x7fff, as on GPUs.
  static uint16_t narrow(float x) {
    const auto bits = bits_as<uint32_t>(x);
    const uint32_t rounded = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16;
    return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fffu : rounded);
  }
};

struct Fp16 {
  static float widen(uint16_t x) {
    const uint32_t sign = uint32_t{x & 0x8000u} << 16, magnitude = x & 0x7fffu;
    // A multiplication changes the exponent's bias, which is correct for subnormals as well.
    const auto finite = bits_as<uint32_t>(bits_as<float>(magnitude << 13) * 0x1p112f);
    return bits_as<float>(sign | (magnitude >= 0x7c00u ? 0x7f800000u | (magnitude & 0x3ffu) << 13 : finite));
  }
  static uint16_t narrow(float x) {
    const auto bits = bits_as<uint32_t>(x);
    const uint32_t sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
    const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
    // Below 2^-14 the last bit of the sum has the weight of a subnormal's.
    const uint32_t small = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - bits_as<uint32_t>(0.5f);
    uint32_t half = magnitude < 0x38800000u ? small : normal;
    half = magnitude >= 0x47800000u ? 0x7c00u : half;
    return static_cast<uint16_t>(magnitude > 0x7f800000u ? 0x7fffu : sign | half);
  }
};

// Rounds to odd: the last bit records that the result is inexact, so that rounding again to a 16-bit float is
// correct.
inline float to_odd(double exact) {
  const auto rounded = static_cast<float>(exact);
  if (rounded != rounded || static_cast<double>(rounded) == exact) return rounded;
  auto bits = bits_as<uint32_t>(rounded);
  if (std::fabs(static_cast<double>(rounded)) > std::fabs(exact)) --bits;
  return bits_as<float>(bits | 1u);
}

inline float flush(float x) {
  return (bits_as<uint32_t>(x) & 0x7f800000u) == 0 ? bits_as<float>(bits_as<uint32_t>(x) & 0x80000000u) : x;
}

}  // namespace ptx
