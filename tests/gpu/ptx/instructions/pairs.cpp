// Arithmetic on 16-bit floats, single and two per register. Each result is rounded once.
#include <cmath>
#include <string>

#include "../machine/lanes.h"
#include "decode.h"
#include "numbers.h"

namespace ptx {
namespace {

// a + b as a double, rounded to odd.
double sum_to_odd(double a, double b) {
  const double sum = a + b, part = sum - a;
  const double error = (a - (sum - part)) + (b - part);
  auto bits = bits_as<uint64_t>(sum);
  if (error != error || error == 0 || (bits & 1) != 0) return sum;
  bits += (error > 0) == (sum > 0) ? 1 : -1;
  return bits_as<double>(bits);
}

struct Add {
  double operator()(float a, float b) const { return sum_to_odd(a, b); }
};
struct Subtract {
  double operator()(float a, float b) const { return sum_to_odd(a, -static_cast<double>(b)); }
};
struct Multiply {
  double operator()(float a, float b) const { return static_cast<double>(a) * b; }
};
struct MultiplyAdd {
  double operator()(float a, float b, float c) const { return sum_to_odd(static_cast<double>(a) * b, c); }
};
// A NaN operand yields the other one; -0 is less than 0.
struct Minimum {
  double operator()(float a, float b) const {
    if (a == b) return std::signbit(a) ? a : b;
    return a < b || b != b ? a : b;
  }
};
struct Maximum {
  double operator()(float a, float b) const {
    if (a == b) return std::signbit(a) ? b : a;
    return a > b || b != b ? a : b;
  }
};

// Applied to a single value.
template <class Number, class Of>
struct Single {
  template <class... Operands>
  uint16_t operator()(Operands... operands) const {
    return Number::narrow(to_odd(Of()(Number::widen(operands)...)));
  }
};
// Applied to both halves.
template <class Number, class Of>
struct Both {
  template <class... Operands>
  uint32_t operator()(Operands... operands) const {
    using One = Single<Number, Of>;
    const uint16_t low = One()(static_cast<uint16_t>(operands)...);
    const uint16_t high = One()(static_cast<uint16_t>(operands >> 16)...);
    return uint32_t{high} << 16 | low;
  }
};
// neg and abs operate on the sign bit.
template <uint32_t kSigns>
struct Negate {
  template <class T>
  T operator()(T a) const {
    return static_cast<T>(a ^ kSigns);
  }
};
template <uint32_t kSigns>
struct Absolute {
  template <class T>
  T operator()(T a) const {
    return static_cast<T>(a & ~kSigns);
  }
};

template <class Number, class Of>
void add_binary(Table& table, const std::string& name, const std::string& type) {
  table.add(name + "." + type, "222", binary<Single<Number, Of>, uint16_t, uint16_t>);
  table.add(name + "." + type + "x2", "444", binary<Both<Number, Of>, uint32_t, uint32_t>);
}

template <class Number>
void add_type(Table& table, const std::string& type) {
  for (const std::string rounding : {"", ".rn"}) {
    add_binary<Number, Add>(table, "add" + rounding, type);
    add_binary<Number, Subtract>(table, "sub" + rounding, type);
    add_binary<Number, Multiply>(table, "mul" + rounding, type);
  }
  add_binary<Number, Minimum>(table, "min", type);
  add_binary<Number, Maximum>(table, "max", type);
  table.add("fma.rn." + type, "2222", ternary<Single<Number, MultiplyAdd>, uint16_t, uint16_t>);
  table.add("fma.rn." + type + "x2", "4444", ternary<Both<Number, MultiplyAdd>, uint32_t, uint32_t>);
  table.add("neg." + type, "22", unary<Negate<0x8000>, uint16_t, uint16_t>);
  table.add("neg." + type + "x2", "44", unary<Negate<0x80008000>, uint32_t, uint32_t>);
  table.add("abs." + type, "22", unary<Absolute<0x8000>, uint16_t, uint16_t>);
  table.add("abs." + type + "x2", "44", unary<Absolute<0x80008000>, uint32_t, uint32_t>);
}

}  // namespace

void add_pairs(Table& table) {
  add_type<Bf16>(table, "bf16");
  add_type<Fp16>(table, "f16");
}

}  // namespace ptx
