// cvt: conversions between integers and floats.
#include <cmath>
#include <limits>
#include <string>
#include <type_traits>

#include "../machine/lanes.h"
#include "decode.h"
#include "numbers.h"

namespace ptx {
namespace {

// 8-bit values are held in 16-bit registers.
template <class T>
using Held =
    std::conditional_t<sizeof(T) == 1, std::conditional_t<std::is_signed_v<T>, int16_t, uint16_t>, T>;
template <class T>
std::string size_of() {
  return std::string(1, static_cast<char>('0' + sizeof(Held<T>)));
}

template <class To, class From>
struct Convert {
  Held<To> operator()(Held<From> x) const {
    return static_cast<Held<To>>(static_cast<To>(static_cast<From>(x)));
  }
};

template <class To, class From>
struct Saturate {
  Held<To> operator()(Held<From> x) const {
    using Limits = std::numeric_limits<To>;
    const auto value = static_cast<__int128>(static_cast<From>(x));
    if (value > static_cast<__int128>(Limits::max())) return Limits::max();
    return value < static_cast<__int128>(Limits::min()) ? Limits::min() : static_cast<Held<To>>(value);
  }
};

struct Nearest {
  template <class T>
  T operator()(T x) const {
    return std::nearbyint(x);
  }
};
struct TowardsZero {
  template <class T>
  T operator()(T x) const {
    return std::trunc(x);
  }
};
struct Down {
  template <class T>
  T operator()(T x) const {
    return std::floor(x);
  }
};
struct Up {
  template <class T>
  T operator()(T x) const {
    return std::ceil(x);
  }
};

// Saturates; NaN becomes 0, or the lowest 64-bit integer.
template <class To, class From, class Rounding>
struct ToInteger {
  Held<To> operator()(From x) const {
    using Limits = std::numeric_limits<To>;
    if (x != x) return sizeof(To) == 8 ? static_cast<To>(uint64_t{1} << 63) : To{0};
    const From rounded = Rounding()(x);
    if (rounded >= static_cast<From>(Limits::max())) return Limits::max();
    return rounded <= static_cast<From>(Limits::min()) ? Limits::min() : static_cast<To>(rounded);
  }
};

template <class To>
void add_to_integer(Table& table, const std::string& to) {
  const std::string f32 = size_of<To>() + "4", f64 = size_of<To>() + "8";
  table.add("cvt.rni." + to + ".f32", f32, unary<ToInteger<To, float, Nearest>, Held<To>, float>);
  table.add("cvt.rzi." + to + ".f32", f32, unary<ToInteger<To, float, TowardsZero>, Held<To>, float>);
  table.add("cvt.rmi." + to + ".f32", f32, unary<ToInteger<To, float, Down>, Held<To>, float>);
  table.add("cvt.rpi." + to + ".f32", f32, unary<ToInteger<To, float, Up>, Held<To>, float>);
  table.add("cvt.rni." + to + ".f64", f64, unary<ToInteger<To, double, Nearest>, Held<To>, double>);
  table.add("cvt.rzi." + to + ".f64", f64, unary<ToInteger<To, double, TowardsZero>, Held<To>, double>);
  table.add("cvt.rmi." + to + ".f64", f64, unary<ToInteger<To, double, Down>, Held<To>, double>);
  table.add("cvt.rpi." + to + ".f64", f64, unary<ToInteger<To, double, Up>, Held<To>, double>);
}

template <class To, class From>
void add_pair(Table& table, const std::string& to, const std::string& from) {
  const std::string operands = size_of<To>() + size_of<From>();
  table.add("cvt." + to + "." + from, operands, unary<Convert<To, From>, Held<To>, Held<From>>);
  table.add("cvt.sat." + to + "." + from, operands, unary<Saturate<To, From>, Held<To>, Held<From>>);
}

template <class From>
void add_integer(Table& table, const std::string& from) {
  add_pair<int8_t, From>(table, "s8", from);
  add_pair<uint8_t, From>(table, "u8", from);
  add_pair<int16_t, From>(table, "s16", from);
  add_pair<uint16_t, From>(table, "u16", from);
  add_pair<int32_t, From>(table, "s32", from);
  add_pair<uint32_t, From>(table, "u32", from);
  add_pair<int64_t, From>(table, "s64", from);
  add_pair<uint64_t, From>(table, "u64", from);
  table.add("cvt.rn.f32." + from, "4" + size_of<From>(), unary<Convert<float, From>, float, Held<From>>);
  table.add("cvt.rn.f64." + from, "8" + size_of<From>(), unary<Convert<double, From>, double, Held<From>>);
  table.add("cvt.f64." + from, "8" + size_of<From>(), unary<Convert<double, From>, double, Held<From>>);
  add_to_integer<From>(table, from);
}

// Clamps to [0, 1]; NaN becomes 0.
struct SaturateFloat {
  float operator()(float x) const { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
};
// Rounds to nearest, ties away from zero.
struct ToTf32 {
  uint32_t operator()(uint32_t x) const {
    return (x & 0x7fffffffu) > 0x7f800000u ? 0x7fffffffu : (x + 0x1000u) & 0xffffe000u;
  }
};
template <class Number>
struct Widen {
  float operator()(uint16_t x) const { return Number::widen(x); }
};
template <class Number>
struct Narrow {
  uint16_t operator()(float x) const { return Number::narrow(x); }
};
template <class Number>
struct NarrowTwo {
  uint32_t operator()(float high, float low) const {
    return uint32_t{Number::narrow(high)} << 16 | Number::narrow(low);
  }
};
template <class Number>
struct FromInteger {
  uint16_t operator()(int32_t x) const { return Number::narrow(to_odd(x)); }
};

template <class Number>
void add_half(Table& table, const std::string& type) {
  table.add("cvt.f32." + type, "42", unary<Widen<Number>, float, uint16_t>);
  table.add("cvt.rn." + type + ".f32", "24", unary<Narrow<Number>, uint16_t, float>);
  table.add("cvt.rn." + type + "x2.f32", "444", binary<NarrowTwo<Number>, uint32_t, float>);
  table.add("cvt.rn." + type + ".s32", "24", unary<FromInteger<Number>, uint16_t, int32_t>);
  table.add("cvt.rn." + type + ".s16", "22", unary<FromInteger<Number>, uint16_t, int16_t>);
  table.add("cvt.rn." + type + ".u16", "22", unary<FromInteger<Number>, uint16_t, uint16_t>);
}

template <class Rounding>
struct Round {
  float operator()(float x) const { return Rounding()(x); }
};

}  // namespace

void add_conversions(Table& table) {
  add_integer<int8_t>(table, "s8");
  add_integer<uint8_t>(table, "u8");
  add_integer<int16_t>(table, "s16");
  add_integer<uint16_t>(table, "u16");
  add_integer<int32_t>(table, "s32");
  add_integer<uint32_t>(table, "u32");
  add_integer<int64_t>(table, "s64");
  add_integer<uint64_t>(table, "u64");
  add_half<Bf16>(table, "bf16");
  add_half<Fp16>(table, "f16");
  table.add("cvt.sat.f32.f32", "44", unary<SaturateFloat, float, float>);
  table.add("cvt.rna.tf32.f32", "44", unary<ToTf32, uint32_t, uint32_t>);
  table.add("cvt.rni.f32.f32", "44", unary<Round<Nearest>, float, float>);
  table.add("cvt.rzi.f32.f32", "44", unary<Round<TowardsZero>, float, float>);
  table.add("cvt.rmi.f32.f32", "44", unary<Round<Down>, float, float>);
  table.add("cvt.rpi.f32.f32", "44", unary<Round<Up>, float, float>);
  table.add("cvt.f64.f32", "84", unary<Convert<double, float>, double, float>);
  table.add("cvt.rn.f32.f64", "48", unary<Convert<float, double>, float, double>);
}

}  // namespace ptx
