// device.cuh for the emulator: the same names with the same meaning. Each wrapper takes the line that it is
// called from, for reports.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "emulator.h"

namespace peft_kernels::cuda {

using simt::Site;

// ---- Where am I ----------------------------------------------------------------------------------------

inline int thread_index() { return simt::position().thread; }
inline int block_index() { return simt::position().block; }
inline int grid_size() { return simt::position().grid; }
inline int lane_index() { return simt::position().thread % kWarp; }
inline int warp_index(Site site = Site::here()) {
  simt::collective("warp_index", nullptr, [](void* const*) {}, site);
  return simt::position().thread / kWarp;
}

// ---- Waiting and exchanging ----------------------------------------------------------------------------

inline void sync_threads(Site site = Site::here()) { simt::sync_threads(site); }
inline void trap(const char* why, Site site = Site::here()) { simt::trap(why, site); }

namespace detail {

struct Exchange {
  uint32_t given;
  int from;  // the lane whose value this lane takes
  uint32_t taken;
};

template <class T>
T exchange(const char* name, T value, int from, Site site) {
  static_assert(sizeof(T) == 4, "shuffles move 4 bytes");
  Exchange mine{bit_cast<uint32_t>(value), from, 0};
  simt::collective(
      name, &mine,
      [](void* const* given) {
        for (int lane = 0; lane < kWarp; ++lane) {
          auto* to = static_cast<Exchange*>(given[lane]);
          to->taken = static_cast<const Exchange*>(given[to->from])->given;
        }
      },
      site);
  return bit_cast<T>(mine.taken);
}

}  // namespace detail

template <class T>
T shuffle(T value, int lane, Site site = Site::here()) {
  return detail::exchange("shuffle", value, lane & (kWarp - 1), site);
}
template <class T>
T shuffle_xor(T value, int mask, Site site = Site::here()) {
  const int from = lane_index() ^ mask;
  return detail::exchange("shuffle_xor", value, from >= 0 && from < kWarp ? from : lane_index(), site);
}
template <class T>
T shuffle_in_quad(T value, int t, Site site = Site::here()) {
  return detail::exchange("shuffle_in_quad", value, (lane_index() & ~3) | (t & 3), site);
}
inline uint32_t shuffle_from_quad(uint32_t value, int g, Site site = Site::here()) {
  return detail::exchange("shuffle_from_quad", value, (4 * g & 31) | (lane_index() & 3), site);
}
inline uint32_t ballot(bool value, Site site = Site::here()) {
  uint32_t mine = value;
  simt::collective(
      "ballot", &mine,
      [](void* const* given) {
        uint32_t all = 0;
        for (int lane = 0; lane < kWarp; ++lane) all |= *static_cast<uint32_t*>(given[lane]) << lane;
        for (int lane = 0; lane < kWarp; ++lane) *static_cast<uint32_t*>(given[lane]) = all;
      },
      site);
  return mine;
}

// ---- Memory --------------------------------------------------------------------------------------------

namespace detail {

template <class T>
inline constexpr bool kLoadable =
    sizeof(T) == 1 || sizeof(T) == 2 || sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16;

template <class T>
T read(const void* p) {
  T value;
  std::memcpy(&value, p, sizeof(T));
  return value;
}

}  // namespace detail

template <class T>
T load(const T* p, Site site = Site::here()) {
  static_assert(detail::kLoadable<T>, "load: 1, 2, 4, 8 or 16 bytes");
  return detail::read<T>(simt::check_read(p, sizeof(T), site));
}
template <class T>
T load_constant(const T* p, Site site = Site::here()) {
  static_assert(detail::kLoadable<T>, "load_constant: 1, 2, 4, 8 or 16 bytes");
  return detail::read<T>(simt::check_read_constant(p, sizeof(T), site));
}
template <class T>
T load_once(const T* p, Site site = Site::here()) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "load_once: 4, 8 or 16 bytes");
  return load_constant(p, site);
}
template <class T>
void store(T* p, const T& value, Site site = Site::here()) {
  static_assert(detail::kLoadable<T>, "store: 1, 2, 4, 8 or 16 bytes");
  std::memcpy(simt::check_write(p, sizeof(T), site), &value, sizeof(T));
}

template <class T>
T* shared_memory(Site site = Site::here()) {
  return static_cast<T*>(simt::shared_window(sizeof(T), site));
}
inline uint32_t shared_address(const void* p, Site site = Site::here()) {
  return simt::shared_address(p, site);
}
inline uint32_t load_shared(uint32_t address, Site site = Site::here()) {
  const auto* p = static_cast<const uint32_t*>(simt::shared_pointer(address, site));
  return load(p, site);
}

// ---- Asynchronous copies, global to shared -------------------------------------------------------------

inline void copy_async_16(void* to_shared, const void* from, bool valid = true, Site site = Site::here()) {
  simt::copy_async(to_shared, from, valid, site);
}
inline void copy_async_commit() { simt::copy_async_commit(); }
template <int kPending>
void copy_async_wait(Site site = Site::here()) {
  simt::copy_async_wait(kPending, site);
}

// ---- Bits and numbers ----------------------------------------------------------------------------------

inline uint32_t byte_permute(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<uint32_t>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  }
  return result;
}
inline uint32_t select_bits(uint32_t mask, uint32_t a, uint32_t b) { return (a & mask) | (b & ~mask); }
inline uint32_t multiply_high(uint32_t a, uint32_t b) { return static_cast<uint32_t>(uint64_t{a} * b >> 32); }

// Compiled with -ffp-contract=off.
inline float multiply_rn(float a, float b) { return a * b; }
inline float add_rn(float a, float b) { return a + b; }
inline float divide_rn(float a, float b) { return a / b; }
inline float sqrt_rn(float a) { return std::sqrt(a); }
inline float multiply_add(float a, float b, float c) { return std::fma(a, b, c); }
inline float exponential(float x) { return std::exp(x); }
inline float error_function(float x) { return std::erf(x); }
inline float reciprocal(float x) { return 1.0f / x; }

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bit_cast<float>(uint32_t{x.bits} << 16); }
inline float to_float(fp16 x) {
  const uint32_t sign = uint32_t{x.bits & 0x8000u} << 16, magnitude = x.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // The exponent's bias changes by a multiplication, which is right for subnormals as well.
  const float value = bit_cast<float>(magnitude << 13) * 0x1p112f;
  return bit_cast<float>(sign | bit_cast<uint32_t>(value));
}

template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
// A NaN becomes 0x7fff in both types, as the card's conversions do.
template <>
inline bf16 from_float<bf16>(float x) {
  if (x != x) return {0x7fff};
  const uint32_t bits = bit_cast<uint32_t>(x);
  return {static_cast<uint16_t>((bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}
template <>
inline fp16 from_float<fp16>(float x) {
  if (x != x) return {0x7fff};
  const uint32_t bits = bit_cast<uint32_t>(x), sign = bits >> 16 & 0x8000u, magnitude = bits & 0x7fffffffu;
  uint32_t half;
  if (magnitude >= 0x47800000u) {  // 2^16 or more
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: the sum's last bit weighs as much as a subnormal's
    half = bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - bit_cast<uint32_t>(0.5f);
  } else {
    half = (magnitude - 0x38000000u + 0xfffu + (magnitude >> 13 & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
}

template <class T>
uint32_t pack2(float low, float high) {
  return uint32_t{from_float<T>(low).bits} | uint32_t{from_float<T>(high).bits} << 16;
}
template <class T>
float low_half(uint32_t pair) {
  return to_float(T{static_cast<uint16_t>(pair)});
}
template <class T>
float high_half(uint32_t pair) {
  return to_float(T{static_cast<uint16_t>(pair >> 16)});
}

namespace detail {
// The product of two 16-bit floats as a float from which one more rounding gives the right 16-bit float: a
// product of bf16 can be too small for a float, and then its last bit tells that something was cut off.
inline float multiply_once(float a, float b) {
  const double exact = double{a} * b;
  const auto rounded = static_cast<float>(exact);
  if (rounded != rounded || double{rounded} == exact) return rounded;
  uint32_t bits = bit_cast<uint32_t>(rounded);
  if (std::fabs(double{rounded}) > std::fabs(exact)) --bits;
  return bit_cast<float>(bits | 1u);
}
}  // namespace detail

template <class T>
uint32_t multiply2(uint32_t a, uint32_t b) {
  return pack2<T>(detail::multiply_once(low_half<T>(a), low_half<T>(b)),
                  detail::multiply_once(high_half<T>(a), high_half<T>(b)));
}

// ---- Matrix instructions -------------------------------------------------------------------------------

namespace detail {

struct MmaOperands {
  float* c;
  const uint32_t* a;
  const uint32_t* b;
};

// Products are exact; the sums are of floats, k ascending.
template <class T>
void multiply_matrices(void* const* given) {
  float a[16][16], b[16][8], c[16][8];  // [m][k], [k][n], [m][n]
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& mine = *static_cast<const MmaOperands*>(given[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      const int m = g + 8 * (i % 2), k = 2 * t + 8 * (i / 2);
      a[m][k] = low_half<T>(mine.a[i]);
      a[m][k + 1] = high_half<T>(mine.a[i]);
      c[g + 8 * (i / 2)][2 * t + i % 2] = mine.c[i];
    }
    for (int i = 0; i < 2; ++i) {
      b[2 * t + 8 * i][g] = low_half<T>(mine.b[i]);
      b[2 * t + 8 * i + 1][g] = high_half<T>(mine.b[i]);
    }
  }
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < 16; ++k) {
      for (int n = 0; n < 8; ++n) c[m][n] += a[m][k] * b[k][n];
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& mine = *static_cast<const MmaOperands*>(given[lane]);
    for (int i = 0; i < 4; ++i) mine.c[i] = c[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
  }
}

inline float as_tf32(uint32_t bits) { return bit_cast<float>(bits & 0xffffe000u); }

inline void multiply_tf32_matrices(void* const* given) {
  float a[16][8], b[8][8], c[16][8];  // [m][k], [k][n], [m][n]
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& mine = *static_cast<const MmaOperands*>(given[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      a[g + 8 * (i % 2)][t + 4 * (i / 2)] = as_tf32(mine.a[i]);
      c[g + 8 * (i / 2)][2 * t + i % 2] = mine.c[i];
    }
    for (int i = 0; i < 2; ++i) b[t + 4 * i][g] = as_tf32(mine.b[i]);
  }
  for (int m = 0; m < 16; ++m) {
    for (int k = 0; k < 8; ++k) {
      for (int n = 0; n < 8; ++n) c[m][n] += a[m][k] * b[k][n];
    }
  }
  for (int lane = 0; lane < kWarp; ++lane) {
    const auto& mine = *static_cast<const MmaOperands*>(given[lane]);
    for (int i = 0; i < 4; ++i) mine.c[i] = c[lane / 4 + 8 * (i / 2)][2 * (lane % 4) + i % 2];
  }
}

}  // namespace detail

template <class T>
void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site site = Site::here()) {
  detail::MmaOperands mine{c, a, b};
  simt::collective("mma", &mine, detail::multiply_matrices<T>, site);
}
inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                     Site site = Site::here()) {
  detail::MmaOperands mine{c, a, b};
  simt::collective("mma_tf32", &mine, detail::multiply_tf32_matrices, site);
}
// ---- Between blocks ------------------------------------------------------------------------------------

inline uint32_t atomic_add_ordered(uint32_t* counter, uint32_t value, Site site = Site::here()) {
  return simt::atomic_add(counter, value, site);
}

}  // namespace peft_kernels::cuda
