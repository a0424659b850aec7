// setp, set, selp, and logic on predicates.
#include <cmath>
#include <functional>
#include <string>
#include <type_traits>

#include "../machine/lanes.h"
#include "decode.h"
#include "numbers.h"

namespace ptx {
namespace {

struct NotEqual {
  template <class T>
  bool operator()(T a, T b) const {
    return a < b || b < a;
  }
};
struct AreOrdered {
  template <class T>
  bool operator()(T a, T b) const {
    return a == a && b == b;
  }
};
// True also if one operand is NaN (unordered).
template <class Opposite>
struct UnorderedOrNot {
  template <class T>
  bool operator()(T a, T b) const {
    return !Opposite()(a, b);
  }
};
// The comparison on 16-bit floats.
template <class Of, class Number>
struct Widened {
  bool operator()(uint16_t a, uint16_t b) const { return Of()(Number::widen(a), Number::widen(b)); }
};

template <class Of, class T>
uint32_t compare_lanes(const Warp& warp, const Instruction& i) {
  const auto* a = warp.in<T>(i.a);
  const auto* b = warp.in<T>(i.b);
  uint32_t lanes = 0;
  for (int lane = 0; lane < kLanes; ++lane) lanes |= uint32_t{Of()(T(a[lane]), T(b[lane]))} << lane;
  return lanes;
}

template <class Of, class T>
void compare(Warp& warp, const Instruction& i) {
  warp.set_predicate(i.d, compare_lanes<Of, T>(warp, i));
}
template <class Of, class T>
void compare_and(Warp& warp, const Instruction& i) {
  warp.set_predicate(i.d, compare_lanes<Of, T>(warp, i) & warp.predicate(i.c));
}
template <class Of, class T>
void compare_or(Warp& warp, const Instruction& i) {
  warp.set_predicate(i.d, compare_lanes<Of, T>(warp, i) | warp.predicate(i.c));
}
template <class Of, class T>
void compare_xor(Warp& warp, const Instruction& i) {
  warp.set_predicate(i.d, compare_lanes<Of, T>(warp, i) ^ warp.predicate(i.c));
}
// All ones if true, else 0.
template <class Of, class T>
void compare_to_word(Warp& warp, const Instruction& i) {
  const auto* a = warp.in<T>(i.a);
  const auto* b = warp.in<T>(i.b);
  alignas(64) uint32_t result[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) result[lane] = Of()(T(a[lane]), T(b[lane])) ? ~0u : 0;
  keep(warp, i.d, result);
}

template <class Of, class T>
void add_comparison(Table& table, const std::string& name, const std::string& type) {
  const std::string size(1, static_cast<char>('0' + sizeof(T))), operands = "p" + size + size;
  table.add("setp." + name + "." + type, operands, compare<Of, T>);
  table.add("setp." + name + ".and." + type, operands + "p", compare_and<Of, T>);
  table.add("setp." + name + ".or." + type, operands + "p", compare_or<Of, T>);
  table.add("setp." + name + ".xor." + type, operands + "p", compare_xor<Of, T>);
  table.add("set." + name + ".u32." + type, "4" + size + size, compare_to_word<Of, T>);
  table.add("set." + name + ".s32." + type, "4" + size + size, compare_to_word<Of, T>);
}

// Compares both halves of a register, with a predicate each.
template <class Of>
void compare_pairs(Warp& warp, const Instruction& i) {
  const auto* a = warp.in<uint32_t>(i.a);
  const auto* b = warp.in<uint32_t>(i.b);
  uint32_t low = 0, high = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    const uint32_t x = a[lane], y = b[lane];
    low |= uint32_t{Of()(static_cast<uint16_t>(x), static_cast<uint16_t>(y))} << lane;
    high |= uint32_t{Of()(static_cast<uint16_t>(x >> 16), static_cast<uint16_t>(y >> 16))} << lane;
  }
  warp.set_predicate(i.d, low);
  warp.set_predicate(i.e, high);
}

// Calls `add` with the name and the functor of each comparison.
template <class Add>
void for_all(const Add& add) {
  add("eq", std::equal_to<>());
  add("ne", NotEqual());
  add("lt", std::less<>());
  add("le", std::less_equal<>());
  add("gt", std::greater<>());
  add("ge", std::greater_equal<>());
}
template <class Add>
void for_unsigned(const Add& add) {
  add("lo", std::less<>());
  add("ls", std::less_equal<>());
  add("hi", std::greater<>());
  add("hs", std::greater_equal<>());
}
template <class Add>
void for_floats(const Add& add) {
  add("equ", UnorderedOrNot<NotEqual>());
  add("neu", UnorderedOrNot<std::equal_to<>>());
  add("ltu", UnorderedOrNot<std::greater_equal<>>());
  add("leu", UnorderedOrNot<std::greater<>>());
  add("gtu", UnorderedOrNot<std::less_equal<>>());
  add("geu", UnorderedOrNot<std::less<>>());
  add("num", AreOrdered());
  add("nan", UnorderedOrNot<AreOrdered>());
}

template <class T>
void add_type(Table& table, const std::string& type) {
  const auto add = [&](const char* name, auto of) { add_comparison<decltype(of), T>(table, name, type); };
  for_all(add);
  if constexpr (std::is_unsigned_v<T>) for_unsigned(add);
  if constexpr (std::is_floating_point_v<T>) for_floats(add);
}

template <class Number>
void add_half(Table& table, const std::string& type) {
  const auto add = [&](const std::string& name, auto of) {
    using Of = Widened<decltype(of), Number>;
    add_comparison<Of, uint16_t>(table, name, type);
    table.add("setp." + name + "." + type + "x2", "q44", compare_pairs<Of>);
  };
  for_all(add);
  for_floats(add);
}

template <class T>
void select(Warp& warp, const Instruction& i) {
  const auto* a = warp.in<T>(i.a);
  const auto* b = warp.in<T>(i.b);
  const uint32_t chosen = warp.predicate(i.c);
  alignas(64) T result[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    const T yes = a[lane], no = b[lane];
    result[lane] = (chosen >> lane & 1) != 0 ? yes : no;
  }
  keep(warp, i.d, result);
}

void and_predicates(Warp& warp, const Instruction& i) {
  warp.set_predicate(i.d, warp.predicate(i.a) & warp.predicate(i.b));
}
void or_predicates(Warp& warp, const Instruction& i) {
  warp.set_predicate(i.d, warp.predicate(i.a) | warp.predicate(i.b));
}
void xor_predicates(Warp& warp, const Instruction& i) {
  warp.set_predicate(i.d, warp.predicate(i.a) ^ warp.predicate(i.b));
}
void not_predicate(Warp& warp, const Instruction& i) { warp.set_predicate(i.d, ~warp.predicate(i.a)); }
void move_predicate(Warp& warp, const Instruction& i) { warp.set_predicate(i.d, warp.predicate(i.a)); }

}  // namespace

void add_comparisons(Table& table) {
  add_type<int16_t>(table, "s16");
  add_type<uint16_t>(table, "u16");
  add_type<uint16_t>(table, "b16");
  add_type<int32_t>(table, "s32");
  add_type<uint32_t>(table, "u32");
  add_type<uint32_t>(table, "b32");
  add_type<int64_t>(table, "s64");
  add_type<uint64_t>(table, "u64");
  add_type<uint64_t>(table, "b64");
  add_type<float>(table, "f32");
  add_type<double>(table, "f64");
  add_half<Bf16>(table, "bf16");
  add_half<Fp16>(table, "f16");
  for (const char* type : {"b16", "u16", "s16"}) {
    table.add(std::string("selp.") + type, "222p", select<uint16_t>);
  }
  for (const char* type : {"b32", "u32", "s32", "f32"}) {
    table.add(std::string("selp.") + type, "444p", select<uint32_t>);
  }
  for (const char* type : {"b64", "u64", "s64", "f64"}) {
    table.add(std::string("selp.") + type, "888p", select<uint64_t>);
  }
  table.add("and.pred", "ppp", and_predicates);
  table.add("or.pred", "ppp", or_predicates);
  table.add("xor.pred", "ppp", xor_predicates);
  table.add("not.pred", "pp", not_predicate);
  table.add("mov.pred", "pp", move_predicate);
}

}  // namespace ptx
