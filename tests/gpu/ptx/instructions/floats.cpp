// Arithmetic on fp32 and fp64. Results are rounded to nearest, or as the opcode says. .approx instructions
// are correctly rounded, unless Options::perturb_approximations is set.
#include <cmath>
#include <functional>
#include <limits>
#include <string>

#include "../machine/lanes.h"
#include "../machine/machine.h"
#include "decode.h"
#include "numbers.h"

namespace ptx {
namespace {

struct MultiplyAdd {
  float operator()(float a, float b, float c) const { return __builtin_fmaf(a, b, c); }
  double operator()(double a, double b, double c) const { return __builtin_fma(a, b, c); }
};
// The NaN that arithmetic produces.
template <class T>
T no_number() {
  if constexpr (sizeof(T) == 4) return bits_as<float>(0x7fffffffu);
  return std::numeric_limits<T>::quiet_NaN();
}
// A NaN operand yields the other one.
struct Minimum {
  template <class T>
  T operator()(T a, T b) const {
    if (a == b) return std::signbit(a) ? a : b;
    if (a != a && b != b) return no_number<T>();
    return a < b || b != b ? a : b;
  }
};
struct Maximum {
  template <class T>
  T operator()(T a, T b) const {
    if (a == b) return std::signbit(a) ? b : a;
    if (a != a && b != b) return no_number<T>();
    return a > b || b != b ? a : b;
  }
};
template <class Of>
struct OrNan {
  template <class T>
  T operator()(T a, T b) const {
    return a != a || b != b ? no_number<T>() : Of()(a, b);
  }
};
struct Absolute {
  template <class T>
  T operator()(T a) const {
    return std::fabs(a);
  }
};
struct SquareRoot {
  template <class T>
  T operator()(T a) const {
    return std::sqrt(a);
  }
};
struct CopySign {
  template <class T>
  T operator()(T sign, T magnitude) const {
    return std::copysign(magnitude, sign);
  }
};

// a * b + c rounded down or up: the nearest float, or its neighbour if that is on the wrong side of the exact
// sum.
template <bool kUp>
struct MultiplyAddTowards {
  float operator()(float a, float b, float c) const {
    const float nearest = __builtin_fmaf(a, b, c);
    if (!std::isfinite(nearest)) return nearest;
    // product + c equals sum + rest exactly, and the difference of two floats this close is exact.
    const double product = static_cast<double>(a) * b, sum = product + c, part = sum - product;
    const double rest = (product - (sum - part)) + (c - part), difference = sum - nearest;
    const double missing = difference != 0 ? difference : rest;
    if (missing == 0) return nearest;
    if (kUp) return missing > 0 ? std::nextafter(nearest, INFINITY) : nearest;
    return missing < 0 ? std::nextafter(nearest, -INFINITY) : nearest;
  }
};

template <class Of>
struct Flushing {
  float operator()(float a) const { return flush(Of()(flush(a))); }
  float operator()(float a, float b) const { return flush(Of()(flush(a), flush(b))); }
  float operator()(float a, float b, float c) const { return flush(Of()(flush(a), flush(b), flush(c))); }
};

// Rounds; with perturb_approximations, adds up to `units` units in the last place.
float approximate(double exact, float operand, uint32_t units = 1) {
  const auto rounded = static_cast<float>(exact);
  if (!options().perturb_approximations || !std::isnormal(rounded)) return rounded;
  uint32_t hash = (bits_as<uint32_t>(operand) ^ options().seed * 0x85ebca6bu) * 0x9e3779b1u;
  hash ^= hash >> 15;
  // 1 and 0 stay exact, which kernels may rely on.
  if (exact == static_cast<double>(rounded)) return rounded;
  return bits_as<float>(bits_as<uint32_t>(rounded) + hash % (2 * units + 1) - units);
}
struct Exponential {
  float operator()(float a) const { return approximate(std::exp2(static_cast<double>(a)), a, 2); }
};
struct Logarithm {
  float operator()(float a) const { return approximate(std::log2(static_cast<double>(a)), a); }
};
struct Reciprocal {
  float operator()(float a) const { return approximate(1.0 / a, a); }
};
struct ReciprocalRoot {
  float operator()(float a) const { return approximate(1.0 / std::sqrt(static_cast<double>(a)), a); }
};
struct Root {
  float operator()(float a) const { return approximate(std::sqrt(static_cast<double>(a)), a); }
};
struct Quotient {
  float operator()(float a, float b) const { return approximate(static_cast<double>(a) / b, a, 2); }
};
struct Sine {
  float operator()(float a) const { return approximate(std::sin(static_cast<double>(a)), a); }
};
struct Cosine {
  float operator()(float a) const { return approximate(std::cos(static_cast<double>(a)), a); }
};
struct HyperbolicTangent {
  float operator()(float a) const { return approximate(std::tanh(static_cast<double>(a)), a); }
};
struct RoundedReciprocal {
  template <class T>
  T operator()(T a) const {
    return T{1} / a;
  }
};

// With and without .ftz.
template <class Of>
void add_unary(Table& table, const std::string& name) {
  table.add(name + ".f32", "44", unary<Of, float, float>);
  table.add(name + ".ftz.f32", "44", unary<Flushing<Of>, float, float>);
}
template <class Of>
void add_binary(Table& table, const std::string& name) {
  table.add(name + ".f32", "444", binary<Of, float, float>);
  table.add(name + ".ftz.f32", "444", binary<Flushing<Of>, float, float>);
}
template <class Of>
void add_ternary(Table& table, const std::string& name) {
  table.add(name + ".f32", "4444", ternary<Of, float, float>);
  table.add(name + ".ftz.f32", "4444", ternary<Flushing<Of>, float, float>);
}

}  // namespace

void add_floats(Table& table) {
  for (const std::string rounding : {"", ".rn"}) {
    add_binary<std::plus<>>(table, "add" + rounding);
    add_binary<std::minus<>>(table, "sub" + rounding);
    add_binary<std::multiplies<>>(table, "mul" + rounding);
    table.add("add" + rounding + ".f64", "888", binary<std::plus<>, double, double>);
    table.add("sub" + rounding + ".f64", "888", binary<std::minus<>, double, double>);
    table.add("mul" + rounding + ".f64", "888", binary<std::multiplies<>, double, double>);
  }
  add_ternary<MultiplyAdd>(table, "fma.rn");
  add_ternary<MultiplyAddTowards<false>>(table, "fma.rm");
  add_ternary<MultiplyAddTowards<true>>(table, "fma.rp");
  table.add("fma.rn.f64", "8888", ternary<MultiplyAdd, double, double>);
  add_binary<Minimum>(table, "min");
  add_binary<Maximum>(table, "max");
  add_binary<OrNan<Minimum>>(table, "min.NaN");
  add_binary<OrNan<Maximum>>(table, "max.NaN");
  table.add("min.f64", "888", binary<Minimum, double, double>);
  table.add("max.f64", "888", binary<Maximum, double, double>);
  add_unary<std::negate<>>(table, "neg");
  add_unary<Absolute>(table, "abs");
  table.add("neg.f64", "88", unary<std::negate<>, double, double>);
  table.add("abs.f64", "88", unary<Absolute, double, double>);
  table.add("copysign.f32", "444", binary<CopySign, float, float>);
  table.add("copysign.f64", "888", binary<CopySign, double, double>);
  add_binary<std::divides<>>(table, "div.rn");
  add_binary<Quotient>(table, "div.full");
  add_binary<Quotient>(table, "div.approx");
  table.add("div.rn.f64", "888", binary<std::divides<>, double, double>);
  add_unary<SquareRoot>(table, "sqrt.rn");
  add_unary<Root>(table, "sqrt.approx");
  table.add("sqrt.rn.f64", "88", unary<SquareRoot, double, double>);
  add_unary<RoundedReciprocal>(table, "rcp.rn");
  table.add("rcp.rn.f64", "88", unary<RoundedReciprocal, double, double>);
  add_unary<Reciprocal>(table, "rcp.approx");
  add_unary<ReciprocalRoot>(table, "rsqrt.approx");
  add_unary<Exponential>(table, "ex2.approx");
  add_unary<Logarithm>(table, "lg2.approx");
  add_unary<Sine>(table, "sin.approx");
  add_unary<Cosine>(table, "cos.approx");
  table.add("tanh.approx.f32", "44", unary<HyperbolicTangent, float, float>);
}

}  // namespace ptx
