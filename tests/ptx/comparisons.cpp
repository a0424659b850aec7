// setp, selp, and what is done with predicates.
#include <cmath>
#include <string>
#include <type_traits>

#include "decode.h"
#include "lanes.h"

namespace ptx {
namespace {

struct Equal {
  template <class T>
  static bool of(T a, T b) {
    return a == b;
  }
};
struct NotEqual {
  template <class T>
  static bool of(T a, T b) {
    return a < b || b < a;
  }
};
struct Less {
  template <class T>
  static bool of(T a, T b) {
    return a < b;
  }
};
struct LessOrEqual {
  template <class T>
  static bool of(T a, T b) {
    return a <= b;
  }
};
struct Greater {
  template <class T>
  static bool of(T a, T b) {
    return a > b;
  }
};
struct GreaterOrEqual {
  template <class T>
  static bool of(T a, T b) {
    return a >= b;
  }
};
struct AreNumbers {
  template <class T>
  static bool of(T a, T b) {
    return a == a && b == b;
  }
};
// Or one of them is no number.
template <class Opposite>
struct Unless {
  template <class T>
  static bool of(T a, T b) {
    return !Opposite::of(a, b);
  }
};

template <class Of, class T>
uint32_t compare_lanes(const Warp& warp, const Instruction& i) {
  const auto* a = warp.in<T>(i.a);
  const auto* b = warp.in<T>(i.b);
  uint32_t lanes = 0;
  for (int lane = 0; lane < kLanes; ++lane) lanes |= uint32_t{Of::of(T(a[lane]), T(b[lane]))} << lane;
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
// 1, or 0 if not.
template <class Of, class T>
void compare_to_word(Warp& warp, const Instruction& i) {
  const auto* a = warp.in<T>(i.a);
  const auto* b = warp.in<T>(i.b);
  alignas(64) uint32_t result[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) result[lane] = Of::of(T(a[lane]), T(b[lane])) ? ~0u : 0;
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

template <class T>
void add_type(Table& table, const std::string& type) {
  add_comparison<Equal, T>(table, "eq", type);
  add_comparison<NotEqual, T>(table, "ne", type);
  add_comparison<Less, T>(table, "lt", type);
  add_comparison<LessOrEqual, T>(table, "le", type);
  add_comparison<Greater, T>(table, "gt", type);
  add_comparison<GreaterOrEqual, T>(table, "ge", type);
  if (std::is_unsigned_v<T>) {
    add_comparison<Less, T>(table, "lo", type);
    add_comparison<LessOrEqual, T>(table, "ls", type);
    add_comparison<Greater, T>(table, "hi", type);
    add_comparison<GreaterOrEqual, T>(table, "hs", type);
  }
  if (std::is_floating_point_v<T>) {
    add_comparison<Unless<NotEqual>, T>(table, "equ", type);
    add_comparison<Unless<Equal>, T>(table, "neu", type);
    add_comparison<Unless<GreaterOrEqual>, T>(table, "ltu", type);
    add_comparison<Unless<Greater>, T>(table, "leu", type);
    add_comparison<Unless<LessOrEqual>, T>(table, "gtu", type);
    add_comparison<Unless<Less>, T>(table, "geu", type);
    add_comparison<AreNumbers, T>(table, "num", type);
    add_comparison<Unless<AreNumbers>, T>(table, "nan", type);
  }
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
