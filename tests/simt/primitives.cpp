// The emulator's wrappers against plain C++, for test_emulator.py.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "body.h"
#include "cases.h"

namespace peft_kernels::cuda {
namespace {

uint32_t random_bits(uint64_t& state) {
  state = state * 6364136223846793005u + 1442695040888963407u;
  return static_cast<uint32_t>(state >> 32);
}

// ---- Numbers -------------------------------------------------------------------------------------------

// The value of a 16-bit float with so many bits of exponent and mantissa, from the definition; infinity as
// the power of two that the format would go on with.
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

  // To the nearest, ties to even, by search.
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
constexpr Format kBf16{8, 7}, kFp16{5, 10};

template <class T>
void widening(const Format& format) {
  for (uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float x = to_float(T{static_cast<uint16_t>(bits)});
    const uint32_t magnitude = bits & 0x7fffu;
    const std::string what = "bits " + std::to_string(bits) + " as a float";
    expect(std::signbit(x) == (bits >= 0x8000u), what);
    if (magnitude > format.infinity()) {
      expect(std::isnan(x), what);
    } else if (magnitude == format.infinity()) {
      expect(std::isinf(x), what);
    } else {
      expect(double{x} == format.value(bits), what);
      expect(from_float<T>(x).bits == bits, what + " and back");
    }
  }
}

// All values, all that lie halfway between two, and their neighbours.
template <class T>
void narrowing(const Format& format) {
  for (uint32_t bits = 0; bits < format.infinity(); ++bits) {
    const auto halfway = static_cast<float>((format.value(bits) + format.value(bits + 1)) / 2);
    for (const float at : {static_cast<float>(format.value(bits)), halfway}) {
      for (const float x : {at, std::nextafter(at, 0.0f), std::nextafter(at, INFINITY), -at}) {
        expect(from_float<T>(x).bits == format.nearest(double{x}), std::to_string(x) + " to be rounded");
      }
    }
  }
  expect(from_float<T>(INFINITY).bits == format.infinity(), "infinity to stay");
  expect(from_float<T>(-INFINITY).bits == (format.infinity() | 0x8000u), "-infinity to stay");
  expect(from_float<T>(std::nanf("")).bits == 0x7fff, "NaN to become the card's");
  expect(pack2<T>(1.0f, -2.0f) == (from_float<T>(1.0f).bits | uint32_t{from_float<T>(-2.0f).bits} << 16),
         "pack2 to put the first in the low half");
  expect(low_half<T>(pack2<T>(1.0f, -2.0f)) == 1.0f && high_half<T>(pack2<T>(1.0f, -2.0f)) == -2.0f,
         "the halves of a pair");
}

template <class T>
void products(const Format& format) {
  uint64_t state = 1;
  const auto is_number = [&](uint32_t bits) { return (bits & 0x7fffu) < format.infinity(); };
  for (int i = 0; i < 400000; ++i) {
    const uint32_t a = random_bits(state), b = random_bits(state), product = multiply2<T>(a, b);
    for (int shift = 0; shift < 32; shift += 16) {
      const uint32_t x = a >> shift & 0xffffu, y = b >> shift & 0xffffu;
      if (!is_number(x) || !is_number(y)) continue;
      const uint32_t rounded = format.nearest(format.value(x) * format.value(y));
      expect((product >> shift & 0xffffu) == rounded, std::to_string(x) + " times " + std::to_string(y));
    }
  }
}

void bits_and_floats() {
  uint64_t state = 1;
  for (uint32_t selector = 0; selector < 0x10000; ++selector) {
    const uint32_t a = random_bits(state), b = random_bits(state);
    uint8_t from[8], to[4];
    std::memcpy(from, &a, 4);
    std::memcpy(from + 4, &b, 4);
    for (int i = 0; i < 4; ++i) to[i] = from[selector >> (4 * i) & 7];
    uint32_t result;
    std::memcpy(&result, to, 4);
    expect(byte_permute(a, b, selector) == result, "byte_permute to pick bytes");
    expect(select_bits(selector, a, b) == (b ^ ((a ^ b) & selector)), "select_bits by a mask");
    expect(multiply_high(a, b) == static_cast<uint32_t>((uint64_t{a} * b) >> 32), "multiply_high");
  }
  // 1 + 2^-12 squared is cut off, unless it is added before rounding.
  const float x = 1.0f + 0x1p-12f;
  expect(add_rn(multiply_rn(x, x), -1.0f - 0x1p-11f) == 0.0f, "a product to be rounded");
  expect(multiply_add(x, x, -1.0f - 0x1p-11f) == 0x1p-24f, "multiply_add to round once");
  expect(divide_rn(1.0f, 3.0f) == 0x1.555556p-2f && sqrt_rn(2.0f) == 0x1.6a09e6p0f, "rounded quotients");
}

// ---- Warps ---------------------------------------------------------------------------------------------

void exchange_body(const uint32_t* in, uint32_t* out) {
  const int lane = lane_index();
  const uint32_t value = load(in + lane);
  store(out + lane, shuffle(value, (lane * 7 + 3) % kWarp));
  store(out + 32 + lane, shuffle_xor(value, 5));
  store(out + 64 + lane, ballot((value & 1) != 0));
  store(out + 96 + lane, static_cast<uint32_t>(warp_index()));
  store(out + 128 + lane, shuffle_from_quad(value, 5));
}
void exchange() {
  std::vector<uint32_t> in(kWarp), out(160);
  uint64_t state = 1;
  uint32_t odd = 0;
  for (int lane = 0; lane < kWarp; ++lane) {
    in[lane] = random_bits(state);
    odd |= (in[lane] & 1) << lane;
  }
  run_kernel<uint32_t, uint32_t, exchange_body>(in, out);
  for (int lane = 0; lane < kWarp; ++lane) {
    expect(out[lane] == in[(lane * 7 + 3) % kWarp], "shuffle to give the value of a lane");
    expect(out[32 + lane] == in[lane ^ 5], "shuffle_xor to give the value of a lane");
    expect(out[64 + lane] == odd && out[96 + lane] == 0, "ballot and warp_index");
    expect(out[128 + lane] == in[20 + lane % 4], "shuffle_from_quad to give the value of a lane");
  }
}

struct MmaIo {
  float c[4];
  uint32_t a[4], b[2];
};
template <class T>
void mma_body(const MmaIo* in, MmaIo* out) {
  MmaIo mine = in[lane_index()];
  mma<T>(mine.c, mine.a, mine.b);
  out[lane_index()] = mine;
}
// Small integers, so that all sums are exact, laid out by the formulas of the instruction's description: the
// row of a[i] is g for even i and g + 8 for odd ones; its column is 2t + (i / 2) 8, and one more in the high
// half; and so on.
template <class T>
void matrix_products() {
  int a[16][16], b[16][8], c[16][8];
  uint64_t state = 1;
  const auto draw = [&] { return static_cast<int>(random_bits(state) % 17) - 8; };
  for (auto& row : a)
    for (int& x : row) x = draw();
  for (auto& row : b)
    for (int& x : row) x = draw();
  for (auto& row : c)
    for (int& x : row) x = draw();
  std::vector<MmaIo> in(kWarp), out(kWarp);
  for (int lane = 0; lane < kWarp; ++lane) {
    const int g = lane >> 2, t = lane & 3;
    const auto pair = [](int low, int high) {
      return pack2<T>(static_cast<float>(low), static_cast<float>(high));
    };
    in[lane] = {
        {float(c[g][2 * t]), float(c[g][2 * t + 1]), float(c[g + 8][2 * t]), float(c[g + 8][2 * t + 1])},
        {pair(a[g][2 * t], a[g][2 * t + 1]), pair(a[g + 8][2 * t], a[g + 8][2 * t + 1]),
         pair(a[g][2 * t + 8], a[g][2 * t + 9]), pair(a[g + 8][2 * t + 8], a[g + 8][2 * t + 9])},
        {pair(b[2 * t][g], b[2 * t + 1][g]), pair(b[2 * t + 8][g], b[2 * t + 9][g])}};
  }
  run_kernel<MmaIo, MmaIo, mma_body<T>>(in, out);
  for (int m = 0; m < 16; ++m) {
    for (int n = 0; n < 8; ++n) {
      int sum = c[m][n];
      for (int k = 0; k < 16; ++k) sum += a[m][k] * b[k][n];
      const MmaIo& owner = out[4 * (m % 8) + n / 2];
      expect(owner.c[2 * (m / 8) + n % 2] == static_cast<float>(sum), "element of a matrix product");
    }
  }
}

}  // namespace

const Cases& primitive_cases() {
  static const Cases cases = {
      {"widening_bf16", [] { widening<bf16>(kBf16); }},
      {"widening_fp16", [] { widening<fp16>(kFp16); }},
      {"narrowing_bf16", [] { narrowing<bf16>(kBf16); }},
      {"narrowing_fp16", [] { narrowing<fp16>(kFp16); }},
      {"products_bf16", [] { products<bf16>(kBf16); }},
      {"products_fp16", [] { products<fp16>(kFp16); }},
      {"bits_and_floats", bits_and_floats},
      {"exchange", exchange},
      {"matrix_products_bf16", matrix_products<bf16>},
      {"matrix_products_fp16", matrix_products<fp16>},
  };
  return cases;
}

}  // namespace peft_kernels::cuda
