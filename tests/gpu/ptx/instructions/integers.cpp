// Arithmetic, logic, shifts and bit fields on integers.
#include <algorithm>
#include <functional>
#include <limits>
#include <string>
#include <type_traits>

#include "../machine/lanes.h"
#include "decode.h"

namespace ptx {
namespace {

template <class T>
using Unsigned = std::make_unsigned_t<T>;
template <class T>
using Twice = std::conditional_t<
    sizeof(T) == 2, std::conditional_t<std::is_signed_v<T>, int32_t, uint32_t>,
    std::conditional_t<sizeof(T) == 4, std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>,
                       std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>>>;
// Small integers must not be promoted to int, whose multiplication can overflow.
template <class T>
using Wrapping = std::conditional_t<sizeof(T) < 4, uint32_t, Unsigned<T>>;

struct Add {
  template <class T>
  T operator()(T a, T b) const {
    return static_cast<T>(Wrapping<T>(a) + Wrapping<T>(b));
  }
};
struct Subtract {
  template <class T>
  T operator()(T a, T b) const {
    return static_cast<T>(Wrapping<T>(a) - Wrapping<T>(b));
  }
};
struct MultiplyLow {
  template <class T>
  T operator()(T a, T b) const {
    return static_cast<T>(Wrapping<T>(a) * Wrapping<T>(b));
  }
};
struct MultiplyHigh {
  template <class T>
  T operator()(T a, T b) const {
    return static_cast<T>((Twice<T>(a) * Twice<T>(b)) >> 8 * sizeof(T));
  }
};
struct MultiplyWide {
  template <class T>
  Twice<T> operator()(T a, T b) const {
    return static_cast<Twice<T>>(Twice<T>(a) * Twice<T>(b));
  }
};
struct MultiplyAddLow {
  template <class T>
  T operator()(T a, T b, T c) const {
    return Add()(MultiplyLow()(a, b), c);
  }
};
struct MultiplyAddWide {
  template <class T>
  Twice<T> operator()(T a, T b, Twice<T> c) const {
    return Add()(MultiplyWide()(a, b), c);
  }
};
// Division by zero gives all ones, and the remainder a, as on a GPU.
struct Divide {
  template <class T>
  T operator()(T a, T b) const {
    if (b == 0) return static_cast<T>(~T{0});
    if (std::is_signed_v<T> && b == static_cast<T>(~T{0})) return Subtract()(T{0}, a);
    return static_cast<T>(a / b);
  }
};
struct Remainder {
  template <class T>
  T operator()(T a, T b) const {
    if (b == 0) return a;
    if (std::is_signed_v<T> && b == static_cast<T>(~T{0})) return 0;
    return static_cast<T>(a % b);
  }
};
struct Minimum {
  template <class T>
  T operator()(T a, T b) const {
    return b < a ? b : a;
  }
};
struct Maximum {
  template <class T>
  T operator()(T a, T b) const {
    return a < b ? b : a;
  }
};
struct Negate {
  template <class T>
  T operator()(T a) const {
    return Subtract()(T{0}, a);
  }
};
struct Absolute {
  template <class T>
  T operator()(T a) const {
    return a < 0 ? Negate()(a) : a;
  }
};

// Shifts by at least the width shift everything out.
struct ShiftLeft {
  template <class T>
  T operator()(T a, uint32_t b) const {
    return b < 8 * sizeof(T) ? static_cast<T>(Unsigned<T>(a) << b) : T{0};
  }
};
struct ShiftRight {
  template <class T>
  T operator()(T a, uint32_t b) const {
    constexpr uint32_t kMost = 8 * sizeof(T) - 1;
    if (std::is_unsigned_v<T> && b > kMost) return 0;
    return static_cast<T>(a >> std::min(b, kMost));
  }
};
struct PopulationCount {
  template <class T>
  uint32_t operator()(T a) const {
    return static_cast<uint32_t>(__builtin_popcountll(a));
  }
};
struct LeadingZeros {
  uint32_t operator()(uint32_t a) const { return a == 0 ? 32 : static_cast<uint32_t>(__builtin_clz(a)); }
  uint32_t operator()(uint64_t a) const { return a == 0 ? 64 : static_cast<uint32_t>(__builtin_clzll(a)); }
};
struct ReverseBits {
  template <class T>
  T operator()(T a) const {
    T result = 0;
    for (size_t i = 0; i < 8 * sizeof(T); ++i) result = static_cast<T>(result << 1 | (a >> i & 1));
    return result;
  }
};
struct ExtractBits {
  template <class T>
  T operator()(T a, uint32_t position, uint32_t length) const {
    constexpr uint32_t kBits = 8 * sizeof(T);
    position &= 0xff;
    length &= 0xff;
    if (length == 0) return 0;
    const uint32_t last = std::min(position + length - 1, kBits - 1);
    const bool sign = std::is_signed_v<T> && (Unsigned<T>(a) >> last & 1) != 0;
    const Unsigned<T> bits = position < kBits ? Unsigned<T>(a) >> position : 0;
    if (length >= kBits)
      return static_cast<T>(position == 0 || !sign ? bits : bits | ~(~Unsigned<T>(0) >> position));
    const Unsigned<T> mask = (Unsigned<T>(1) << length) - 1;
    const uint32_t present = position < kBits ? std::min(length, kBits - position) : 0;
    const Unsigned<T> there = present >= kBits ? ~Unsigned<T>(0) : (Unsigned<T>(1) << present) - 1;
    return static_cast<T>((bits & mask & there) | (sign ? ~there : 0));
  }
};

template <class T>
void insert_bits(Warp& warp, const Instruction& i) {
  const auto* a = warp.in<T>(i.a);
  const auto* b = warp.in<T>(i.b);
  const auto* position = warp.in<uint32_t>(i.c);
  const auto* length = warp.in<uint32_t>(i.e);
  alignas(64) T result[kLanes];
  constexpr uint32_t kBits = 8 * sizeof(T);
  for (int lane = 0; lane < kLanes; ++lane) {
    const uint32_t from = position[lane] & 0xff, bits = length[lane] & 0xff;
    const T ones = bits >= kBits ? static_cast<T>(~T{0}) : static_cast<T>((T{1} << bits) - 1);
    const T mask = from < kBits ? static_cast<T>(ones << from) : T{0};
    const T value = from < kBits ? static_cast<T>(a[lane] << from) : T{0};
    result[lane] = (b[lane] & ~mask) | (value & mask);
  }
  keep(warp, i.d, result);
}

// Bit i of the table is the result where a, b and c have the bits i >> 2, i >> 1 & 1 and i & 1.
void look_up_bits(Warp& warp, const Instruction& i) {
  const auto* a = warp.in<uint32_t>(i.a);
  const auto* b = warp.in<uint32_t>(i.b);
  const auto* c = warp.in<uint32_t>(i.c);
  const uint32_t table = *warp.in<uint32_t>(i.e);
  alignas(64) uint32_t result[kLanes] = {};
  for (uint32_t bit = 0; bit < 8; ++bit) {
    if ((table >> bit & 1) == 0) continue;
    const uint32_t not_a = (bit & 4) != 0 ? 0 : ~0u, not_b = (bit & 2) != 0 ? 0 : ~0u;
    const uint32_t not_c = (bit & 1) != 0 ? 0 : ~0u;
    for (int lane = 0; lane < kLanes; ++lane) {
      result[lane] |= (a[lane] ^ not_a) & (b[lane] ^ not_b) & (c[lane] ^ not_c);
    }
  }
  keep(warp, i.d, result);
}

// Bit 3 of a selector fills the byte with the sign.
void permute_bytes(Warp& warp, const Instruction& i) {
  const auto* a = warp.in<uint32_t>(i.a);
  const auto* b = warp.in<uint32_t>(i.b);
  const auto* c = warp.in<uint32_t>(i.c);
  alignas(64) uint32_t result[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    const uint64_t bytes = uint64_t{b[lane]} << 32 | a[lane];
    uint32_t value = 0;
    for (uint32_t j = 0; j < 4; ++j) {
      const uint32_t selector = c[lane] >> 4 * j & 0xf;
      uint32_t byte = static_cast<uint32_t>(bytes >> 8 * (selector & 7)) & 0xff;
      byte = (selector & 8) != 0 ? (byte & 0x80) / 0x80 * 0xff : byte;
      value |= byte << 8 * j;
    }
    result[lane] = value;
  }
  keep(warp, i.d, result);
}

template <bool kLeft, bool kWrap>
void funnel_shift(Warp& warp, const Instruction& i) {
  const auto* low = warp.in<uint32_t>(i.a);
  const auto* high = warp.in<uint32_t>(i.b);
  const auto* count = warp.in<uint32_t>(i.c);
  alignas(64) uint32_t result[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    const uint64_t both = uint64_t{high[lane]} << 32 | low[lane];
    const uint32_t by = kWrap ? count[lane] & 31 : std::min<uint32_t>(count[lane], 32);
    result[lane] = static_cast<uint32_t>(kLeft ? both << by >> 32 : both >> by);
  }
  keep(warp, i.d, result);
}

template <class T>
void add_sized(Table& table, const std::string& type) {
  const std::string size(1, static_cast<char>('0' + sizeof(T)));
  const std::string d_a = size + size, d_ab = d_a + size, d_abc = d_ab + size;
  table.add("add." + type, d_ab, binary<Add, T, T>);
  table.add("sub." + type, d_ab, binary<Subtract, T, T>);
  table.add("mul.lo." + type, d_ab, binary<MultiplyLow, T, T>);
  table.add("mul.hi." + type, d_ab, binary<MultiplyHigh, T, T>);
  table.add("mad.lo." + type, d_abc, ternary<MultiplyAddLow, T, T>);
  table.add("div." + type, d_ab, binary<Divide, T, T>);
  table.add("rem." + type, d_ab, binary<Remainder, T, T>);
  table.add("min." + type, d_ab, binary<Minimum, T, T>);
  table.add("max." + type, d_ab, binary<Maximum, T, T>);
  table.add("shr." + type, d_a + "4", binary<ShiftRight, T, T, uint32_t>);
  if (std::is_signed_v<T>) {
    table.add("neg." + type, d_a, unary<Negate, T, T>);
    table.add("abs." + type, d_a, unary<Absolute, T, T>);
  }
  if constexpr (sizeof(T) < 8) {
    const std::string wide(1, static_cast<char>('0' + 2 * sizeof(T)));
    table.add("mul.wide." + type, wide + d_a, binary<MultiplyWide, Twice<T>, T>);
    table.add("mad.wide." + type, wide + d_a + wide, ternary<MultiplyAddWide, Twice<T>, T, T, Twice<T>>);
  }
  if constexpr (sizeof(T) >= 4) {
    table.add("bfe." + type, d_a + "44", ternary<ExtractBits, T, T, uint32_t>);
  }
}

template <class T>
void add_bits(Table& table, const std::string& type) {
  const std::string size(1, static_cast<char>('0' + sizeof(T))), suffix = "." + type;
  const std::string d_a = size + size, d_ab = d_a + size, d_a4 = d_a + "4";
  table.add("and" + suffix, d_ab, binary<std::bit_and<>, T, T>);
  table.add("or" + suffix, d_ab, binary<std::bit_or<>, T, T>);
  table.add("xor" + suffix, d_ab, binary<std::bit_xor<>, T, T>);
  table.add("not" + suffix, d_a, unary<std::bit_not<>, T, T>);
  table.add("shl" + suffix, d_a4, binary<ShiftLeft, T, T, uint32_t>);
  table.add("shr" + suffix, d_a4, binary<ShiftRight, T, T, uint32_t>);
}

}  // namespace

void add_integers(Table& table) {
  add_sized<int16_t>(table, "s16");
  add_sized<uint16_t>(table, "u16");
  add_sized<int32_t>(table, "s32");
  add_sized<uint32_t>(table, "u32");
  add_sized<int64_t>(table, "s64");
  add_sized<uint64_t>(table, "u64");
  add_bits<uint16_t>(table, "b16");
  add_bits<uint32_t>(table, "b32");
  add_bits<uint64_t>(table, "b64");
  table.add("popc.b32", "44", unary<PopulationCount, uint32_t, uint32_t>);
  table.add("popc.b64", "48", unary<PopulationCount, uint32_t, uint64_t>);
  table.add("clz.b32", "44", unary<LeadingZeros, uint32_t, uint32_t>);
  table.add("clz.b64", "48", unary<LeadingZeros, uint32_t, uint64_t>);
  table.add("brev.b32", "44", unary<ReverseBits, uint32_t, uint32_t>);
  table.add("brev.b64", "88", unary<ReverseBits, uint64_t, uint64_t>);
  table.add("bfi.b32", "44444", insert_bits<uint32_t>);
  table.add("bfi.b64", "88844", insert_bits<uint64_t>);
  table.add("lop3.b32", "44444", look_up_bits);
  table.add("prmt.b32", "4444", permute_bytes);
  table.add("shf.l.wrap.b32", "4444", funnel_shift<true, true>);
  table.add("shf.l.clamp.b32", "4444", funnel_shift<true, false>);
  table.add("shf.r.wrap.b32", "4444", funnel_shift<false, true>);
  table.add("shf.r.clamp.b32", "4444", funnel_shift<false, false>);
}

}  // namespace ptx
