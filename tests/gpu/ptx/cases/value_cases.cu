// Arithmetic, conversion and warp instructions, against plain C++.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "cases.cuh"
#include "core/device.cuh"

namespace cases {
namespace {

using namespace peft_kernels::cuda;

uint32_t random_bits(uint64_t& state) {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<uint32_t>(state >> 32);
}

// out[i] = Function::of(in[i]).
template <class In, class Out>
struct Map {
  const In* in;
  Out* out;
  int count;
};
template <class Function, class In, class Out>
__global__ void map(Map<In, Out> m) {
  const int i = 256 * blockIdx.x + threadIdx.x;
  if (i < m.count) m.out[i] = Function::of(m.in[i]);
}
template <class Function, class Out, class In>
std::vector<Out> mapped(const std::vector<In>& values) {
  const int count = static_cast<int>(values.size());
  const Array<In> in(values);
  const Array<Out> out(values.size());
  run<Map<In, Out>>(map<Function, In, Out>, {in.data(), out.data(), count}, (count + 255) / 256, 256, 0);
  return out.values();
}

// ---- Numbers ------------------------------------------------------------------------------------------

// The value of a 16-bit float with these exponent and mantissa bits, by definition; infinity as the next
// power of two.
double value_of(uint32_t bits, int exponent_bits, int mantissa_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const auto exponent = static_cast<int>(bits >> mantissa_bits & ((1u << exponent_bits) - 1));
  const double mantissa = bits & ((1u << mantissa_bits) - 1);
  const double unit = std::ldexp(1.0, std::max(exponent, 1) - bias - mantissa_bits);
  const double magnitude = ((exponent == 0 ? 0.0 : std::ldexp(1.0, mantissa_bits)) + mantissa) * unit;
  return (bits & 0x8000u) != 0 ? -magnitude : magnitude;
}

struct Format {
  int exponent_bits, mantissa_bits;
  uint32_t infinity() const { return ((1u << exponent_bits) - 1) << mantissa_bits; }
  double value(uint32_t bits) const { return value_of(bits, exponent_bits, mantissa_bits); }

  // Rounds to nearest, ties to even, by search.
  uint32_t nearest(double x) const {
    const uint32_t sign = std::signbit(x) ? 0x8000u : 0u;
    x = std::fabs(x);
    uint32_t below = 0, above = infinity();
    if (x >= value(above)) return sign | above;
    while (above - below > 1) {
      const uint32_t middle = (below + above) / 2;
      (value(middle) <= x ? below : above) = middle;
    }
    const double down = x - value(below), up = value(above) - x;
    return sign | (down < up || (down == up && below % 2 == 0) ? below : above);
  }
};
template <class T>
constexpr Format kFormat = std::is_same_v<T, bf16> ? Format{8, 7} : Format{5, 10};

template <class T>
struct Widen {
  static __device__ float of(T x) { return to_float(x); }
};
template <class T>
struct Narrow {
  static __device__ T of(float x) { return from_float<T>(x); }
};
template <class T>
struct Pack {
  static __device__ uint32_t of(float x) { return pack2<T>(x, -2.0f); }
};

template <class T>
void widening() {
  const Format& format = kFormat<T>;
  std::vector<T> all(0x10000);
  for (uint32_t bits = 0; bits < 0x10000; ++bits) all[bits] = {static_cast<uint16_t>(bits)};
  const auto wide = mapped<Widen<T>, float>(all);
  const auto back = mapped<Narrow<T>, T>(wide);
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float x = wide[bits];
    const uint32_t magnitude = bits & 0x7fffu;
    const std::string what = "bits " + std::to_string(bits) + " as a float";
    expect(std::signbit(x) == (bits >= 0x8000u), what);
    if (magnitude > format.infinity()) {
      expect(std::isnan(x), what);
    } else if (magnitude == format.infinity()) {
      expect(std::isinf(x), what);
    } else {
      expect(double{x} == format.value(bits), what);
      expect(back[bits].bits == bits, what + " and back");
    }
  }
}

// All values, all midpoints of two, and their neighbours.
template <class T>
void narrowing() {
  const Format& format = kFormat<T>;
  std::vector<float> wide;
  for (uint32_t bits = 0; bits < format.infinity(); ++bits) {
    const auto halfway = static_cast<float>((format.value(bits) + format.value(bits + 1)) / 2);
    for (const float at : {static_cast<float>(format.value(bits)), halfway}) {
      wide.insert(wide.end(), {at, std::nextafter(at, 0.0f), std::nextafter(at, INFINITY), -at});
    }
  }
  const auto narrow = mapped<Narrow<T>, T>(wide);
  const auto pairs = mapped<Pack<T>, uint32_t>(wide);
  const uint32_t minus_two = format.nearest(-2.0) << 16;
  for (size_t i = 0; i < wide.size(); ++i) {
    const uint32_t want = format.nearest(double{wide[i]});
    expect(narrow[i].bits == want, std::to_string(wide[i]) + " to be rounded");
    expect(pairs[i] == (want | minus_two), std::to_string(wide[i]) + " to be rounded, into the low half");
  }
  const auto special = mapped<Narrow<T>, T>(std::vector<float>{INFINITY, -INFINITY, std::nanf("")});
  expect(special[0].bits == format.infinity(), "infinity to stay");
  expect(special[1].bits == (format.infinity() | 0x8000u), "-infinity to stay");
  expect(special[2].bits == 0x7fff, "NaN to become the card's");
}

template <class T>
struct Multiply {
  static __device__ uint32_t of(Words2 pairs) { return multiply2<T>(pairs.v[0], pairs.v[1]); }
};
template <class T>
void products() {
  const Format& format = kFormat<T>;
  uint64_t state = 1;
  std::vector<Words2> factors(400000);
  for (Words2& pairs : factors) pairs = {{random_bits(state), random_bits(state)}};
  const auto is_number = [&](uint32_t bits) { return (bits & 0x7fffu) < format.infinity(); };
  const auto found = mapped<Multiply<T>, uint32_t>(factors);
  for (size_t i = 0; i < factors.size(); ++i) {
    for (int shift = 0; shift < 32; shift += 16) {
      const uint32_t x = factors[i].v[0] >> shift & 0xffffu, y = factors[i].v[1] >> shift & 0xffffu;
      if (!is_number(x) || !is_number(y)) continue;
      const uint32_t rounded = format.nearest(format.value(x) * format.value(y));
      expect((found[i] >> shift & 0xffffu) == rounded, std::to_string(x) + " times " + std::to_string(y));
    }
  }
}

struct Bits {
  static __device__ Words4 of(Vec<uint32_t, 4> v) {
    uint32_t parity;
    asm("lop3.b32 %0, %1, %2, %3, 0x96;" : "=r"(parity) : "r"(v.v[0]), "r"(v.v[1]), "r"(v.v[2]));
    return {{__byte_perm(v.v[0], v.v[1], v.v[2] & 0xffff), select_bits(v.v[2], v.v[0], v.v[1]),
             __umulhi(v.v[0], v.v[1]), parity}};
  }
};
void bits() {
  uint64_t state = 1;
  std::vector<Words4> in(0x10000);
  for (uint32_t i = 0; i < in.size(); ++i) {
    in[i] = {{random_bits(state), random_bits(state), i & 0x7777u, 0}};
  }
  const auto out = mapped<Bits, Words4>(in);
  for (size_t i = 0; i < in.size(); ++i) {
    const auto [a, b, selector, unused] = in[i].v;
    uint8_t from[8], to[4];
    std::memcpy(from, &a, 4);
    std::memcpy(from + 4, &b, 4);
    for (int byte = 0; byte < 4; ++byte) to[byte] = from[selector >> (4 * byte) & 7];
    expect(std::memcmp(&out[i].v[0], to, 4) == 0, "byte_permute to pick bytes");
    expect(out[i].v[1] == (b ^ ((a ^ b) & selector)), "select_bits by a mask");
    expect(out[i].v[2] == static_cast<uint32_t>((uint64_t{a} * b) >> 32), "multiply_high");
    expect(out[i].v[3] == (a ^ b ^ selector), "lop3 by another table");
  }
}

struct Rounded {
  // The square of 1 + 2^-12 loses a bit, unless it is added before rounding.
  static __device__ Vec<float, 4> of(float x) {
    return {{__fadd_rn(__fmul_rn(x, x), -1.0f - 0x1p-11f), __fmaf_rn(x, x, -1.0f - 0x1p-11f),
             __fdiv_rn(1.0f, 3.0f + (x - x)), __fsqrt_rn(2.0f + (x - x))}};
  }
};
void floats() {
  const auto out = mapped<Rounded, Vec<float, 4>>(std::vector<float>{1.0f + 0x1p-12f})[0];
  expect(out.v[0] == 0.0f, "a product to be rounded");
  expect(out.v[1] == 0x1p-24f, "multiply_add to round once");
  expect(out.v[2] == 0x1.555556p-2f && out.v[3] == 0x1.6a09e6p0f, "rounded quotients");
}

struct Approximate {
  static __device__ Vec<float, 4> of(float x) {
    return {{expf(x), reciprocal(x), erff(x), exp2_approximate(x)}};
  }
};
void approximations() {
  std::vector<float> in = {-126.5f};
  for (int i = 1; i < 4000; ++i) in.insert(in.end(), {0.02f * i, -0.02f * i});
  const auto out = mapped<Approximate, Vec<float, 4>>(in);
  const auto units = [](float got, double want) {
    const double unit = std::ldexp(1.0, std::max(std::ilogb(want), -126) - 23);
    return std::fabs(got - want) / unit;
  };
  for (size_t i = 0; i < in.size(); ++i) {
    const double x = in[i];
    const std::string of = " of " + std::to_string(x);
    expect(units(out[i].v[0], std::exp(x)) <= 3 || x < -87, "the exponential" + of);
    expect(units(out[i].v[1], 1 / x) <= 2, "the reciprocal" + of);
    expect(units(out[i].v[2], std::erf(x)) <= 3, "the error function" + of);
    expect(x < -126 ? out[i].v[3] == 0.0f : units(out[i].v[3], std::exp2(x)) <= 2, "the power of two" + of);
  }
}

// ---- Warps --------------------------------------------------------------------------------------------

__global__ void exchange_lanes(Map<uint32_t, uint32_t> m) {
  const int lane = threadIdx.x % 32;
  const uint32_t value = m.in[lane];
  m.out[lane] = __shfl_sync(kAllLanes, value, (lane * 7 + 3) % 32);
  m.out[32 + lane] = __shfl_xor_sync(kAllLanes, value, 5);
  m.out[64 + lane] = __ballot_sync(~0u, (value & 1) != 0);
  m.out[96 + lane] = static_cast<uint32_t>(warp_index());
  m.out[128 + lane] = shuffle_from_quad(value, 5);
  m.out[160 + lane] = __shfl_sync(kAllLanes, value, (lane >> 3) % 4, 4);
}
void exchange() {
  std::vector<uint32_t> values(32);
  uint64_t state = 1;
  uint32_t odd = 0;
  for (size_t lane = 0; lane < 32; ++lane) {
    values[lane] = random_bits(state);
    odd |= (values[lane] & 1) << lane;
  }
  const Array<uint32_t> in(values), result(6 * 32);
  run<Map<uint32_t, uint32_t>>(exchange_lanes, {in.data(), result.data(), 0}, 1, 32, 0);
  const auto out = result.values();
  for (size_t lane = 0; lane < 32; ++lane) {
    expect(out[lane] == values[(lane * 7 + 3) % 32], "shuffle to give the value of a lane");
    expect(out[32 + lane] == values[lane ^ 5], "shuffle_xor to give the value of a lane");
    expect(out[64 + lane] == odd && out[96 + lane] == 0, "ballot and warp_index");
    expect(out[128 + lane] == values[20 + lane % 4], "shuffle_from_quad to give the value of a lane");
    expect(out[160 + lane] == values[lane / 4 * 4 + lane / 8], "shuffle_in_quad to give that of one of four");
  }
}

}  // namespace

const Cases& value_cases() {
  static const Cases cases = {
      {"widening_bf16", widening<bf16>},
      {"widening_fp16", widening<fp16>},
      {"narrowing_bf16", narrowing<bf16>},
      {"narrowing_fp16", narrowing<fp16>},
      {"products_bf16", products<bf16>},
      {"products_fp16", products<fp16>},
      {"bits", bits},
      {"floats", floats},
      {"approximations", approximations},
      {"exchange", exchange},
  };
  return cases;
}

}  // namespace cases
