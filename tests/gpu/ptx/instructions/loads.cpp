// ld and st of all spaces.
#include <cstring>
#include <string>
#include <type_traits>

#include "../machine/memory.h"
#include "../machine/warp.h"
#include "decode.h"

namespace ptx {

Grid grid;

void read_addresses(const Warp& warp, const Instruction& i, uint64_t (&addresses)[kLanes]) {
  const auto offset = static_cast<uint64_t>(i.offset);
  if (i.address == 8) {
    const auto* base = warp.in<uint64_t>(i.a);
    for (int lane = 0; lane < kLanes; ++lane) addresses[lane] = base[lane] + offset;
  } else {
    const auto* base = warp.in<uint32_t>(i.a);
    for (int lane = 0; lane < kLanes; ++lane) addresses[lane] = base[lane] + static_cast<uint32_t>(offset);
  }
}

namespace {

enum class Space : uint8_t { kGeneric, kGlobal, kShared };

template <Space kSpace>
void find(Warp& warp, const Instruction& i, Access access, char* (&places)[kLanes],
          const Memory::Values* values = nullptr) {
  uint64_t addresses[kLanes];
  read_addresses(warp, i, addresses);
  const int bytes = i.bytes * i.count;
  if (kSpace == Space::kGlobal) {
    warp.memory->find_global(warp, addresses, bytes, access, i, places);
  } else if (kSpace == Space::kShared) {
    warp.memory->find_shared(warp, addresses, bytes, access, i, places, values);
  } else {
    warp.memory->find_generic(warp, addresses, bytes, access, i, places);
  }
}

// Loads into registers, which may be wider than the element.
template <class Element, class Register>
void take(Warp& warp, const Instruction& i, char* const (&places)[kLanes]) {
  for (int k = 0; k < i.count; ++k) {
    auto* const to = warp.out<Register>(i.list[k]);
    for_lanes(warp.active, [&](int lane) {
      Element element;
      std::memcpy(&element, places[lane] + k * static_cast<int>(sizeof(Element)), sizeof(Element));
      to[lane] = static_cast<Register>(element);
    });
  }
}
template <class Element, class Register>
void put(const Warp& warp, const Instruction& i, char* const (&places)[kLanes]) {
  for (int k = 0; k < i.count; ++k) {
    const auto* const from = warp.in<Register>(i.list[k]);
    for_lanes(warp.active, [&](int lane) {
      const auto element = static_cast<Element>(from[lane]);
      std::memcpy(places[lane] + k * static_cast<int>(sizeof(Element)), &element, sizeof(Element));
    });
  }
}

template <Space kSpace, class Element, class Register>
void load(Warp& warp, const Instruction& i) {
  char* places[kLanes];
  find<kSpace>(warp, i, Access::kRead, places);
  take<Element, Register>(warp, i, places);
  warp.memory->now = {};
}
template <class Element, class Register>
void load_constant(Warp& warp, const Instruction& i) {
  char* places[kLanes];
  find<Space::kGlobal>(warp, i, Access::kReadConstant, places);
  take<Element, Register>(warp, i, places);
  warp.memory->now = {};
}
template <Space kSpace, class Element, class Register>
void store(Warp& warp, const Instruction& i) {
  char* places[kLanes];
  if (kSpace == Space::kShared && grid.same_writes) {
    Memory::Values values;
    for (int lane = 0; lane < kLanes; ++lane) places[lane] = values[lane];
    put<Element, Register>(warp, i, places);
    find<kSpace>(warp, i, Access::kWrite, places, &values);
    return;
  }
  find<kSpace>(warp, i, Access::kWrite, places);
  put<Element, Register>(warp, i, places);
  warp.memory->now = {};
}

// Parameters have offsets from 0, constants have host addresses.
template <class Element, class Register>
void load_parameter(Warp& warp, const Instruction& i) {
  uint64_t addresses[kLanes];
  read_addresses(warp, i, addresses);
  char* places[kLanes];
  for_lanes(warp.active, [&](int lane) {
    if (addresses[lane] > grid.parameters.size() ||
        i.bytes * i.count > static_cast<int64_t>(grid.parameters.size() - addresses[lane])) {
      fail(warp, lane, i.site, "a load from beyond the parameters");
    }
    places[lane] = reinterpret_cast<char*>(grid.parameters.data()) + addresses[lane];
  });
  take<Element, Register>(warp, i, places);
}
template <class Element, class Register>
void load_table(Warp& warp, const Instruction& i) {
  uint64_t addresses[kLanes];
  read_addresses(warp, i, addresses);
  char* places[kLanes];
  const auto& table = *grid.constants;
  for_lanes(warp.active, [&](int lane) {
    const uint64_t offset = addresses[lane] - reinterpret_cast<uint64_t>(table.data());
    if (offset > table.size() || i.bytes * i.count > static_cast<int64_t>(table.size() - offset)) {
      fail(warp, lane, i.site, "a load from beyond the constants");
    }
    places[lane] = reinterpret_cast<char*>(addresses[lane]);
  });
  take<Element, Register>(warp, i, places);
}

// Calls `with` with an element and a register type of these sizes.
template <class With>
Handler with_sizes(const Instruction& i, const With& with) {
  const auto widths = [&](auto element) -> Handler {
    using Element = decltype(element);
    using Wide = std::conditional_t<std::is_signed_v<Element>, int64_t, uint64_t>;
    using Word = std::conditional_t<std::is_signed_v<Element>, int32_t, uint32_t>;
    using Half = std::conditional_t<std::is_signed_v<Element>, int16_t, uint16_t>;
    if constexpr (sizeof(Element) <= 2) {
      if (i.width == 2) return with(element, Half{});
    }
    if constexpr (sizeof(Element) <= 4) {
      if (i.width == 4) return with(element, Word{});
    }
    return i.width == 8 ? with(element, Wide{}) : nullptr;
  };
  switch (i.bytes) {
    case 1:
      return i.is_signed ? widths(int8_t{}) : widths(uint8_t{});
    case 2:
      return i.is_signed ? widths(int16_t{}) : widths(uint16_t{});
    case 4:
      return i.is_signed ? widths(int32_t{}) : widths(uint32_t{});
    case 8:
      return i.is_signed ? widths(int64_t{}) : widths(uint64_t{});
    default:
      return nullptr;
  }
}

template <Space kSpace>
Handler load_from(const Instruction& i) {
  return with_sizes(
      i, [](auto element, auto reg) -> Handler { return load<kSpace, decltype(element), decltype(reg)>; });
}
template <Space kSpace>
Handler store_to(const Instruction& i) {
  return with_sizes(
      i, [](auto element, auto reg) -> Handler { return store<kSpace, decltype(element), decltype(reg)>; });
}

Handler handler_of(const Instruction& i, bool loads, bool constant, std::string_view space) {
  if (!loads) {
    if (space == "global") return store_to<Space::kGlobal>(i);
    if (space == "shared") return store_to<Space::kShared>(i);
    return space.empty() ? store_to<Space::kGeneric>(i) : nullptr;
  }
  if (constant) {
    if (space != "global") return nullptr;
    return with_sizes(
        i, [](auto element, auto reg) -> Handler { return load_constant<decltype(element), decltype(reg)>; });
  }
  if (space == "global") return load_from<Space::kGlobal>(i);
  if (space == "shared") return load_from<Space::kShared>(i);
  if (space == "param") {
    return with_sizes(i, [](auto element, auto reg) -> Handler {
      return load_parameter<decltype(element), decltype(reg)>;
    });
  }
  if (space == "const") {
    return with_sizes(
        i, [](auto element, auto reg) -> Handler { return load_table<decltype(element), decltype(reg)>; });
  }
  return space.empty() ? load_from<Space::kGeneric>(i) : nullptr;
}

bool is_cache_hint(std::string_view word) {
  static constexpr std::string_view kHints[] = {"weak", "volatile", "ca", "cg", "cs", "lu", "wb", "wt"};
  for (const std::string_view hint : kHints) {
    if (word == hint) return true;
  }
  return word.substr(0, 4) == "L1::" || word.substr(0, 4) == "L2::";
}

}  // namespace

void set_address(Decoder& decoder, Instruction& instruction, const Operand& operand) {
  if (operand.kind != Operand::Kind::kAddress) decoder.fail("expected an address");
  instruction.address = 8;
  if (operand.reg >= 0) {
    instruction.address = static_cast<uint8_t>(decoder.width(operand.reg));
    if (instruction.address < 4) decoder.fail("an address in such a register");
    instruction.a = decoder.at(operand.reg);
    instruction.offset = operand.value;
  } else if (operand.name.empty()) {
    instruction.a = decoder.constant(operand.value, 8);
  } else {
    instruction.a = decoder.address_of(operand.name, 8, operand.value);
  }
}

bool decode_memory(Decoder& decoder, const Decoder::Words& words) {
  const bool loads = words[0] == "ld" || words[0] == "ldu";
  if (!loads && words[0] != "st") return false;
  Instruction instruction = decoder.begin();
  instruction.count = 1;
  std::string_view space;
  bool constant = false;
  for (size_t k = 1; k + 1 < words.parts.size(); ++k) {
    const std::string_view word = words[k];
    if (word == "global" || word == "param" || word == "const") {
      space = word;
    } else if (word == "shared" || word == "shared::cta") {
      space = "shared";
    } else if (word == "nc") {
      constant = true;
    } else if (word == "v2" || word == "v4" || word == "v8") {
      instruction.count = static_cast<uint8_t>(word[1] - '0');
    } else if (!is_cache_hint(word)) {
      return false;
    }
  }
  const std::string_view type = words.last();
  const int bytes = bytes_of_type(type);
  if (bytes < 1 || decoder.statement().operands.size() != 2) return false;
  instruction.bytes = static_cast<uint8_t>(bytes);
  instruction.is_signed = loads && type[0] == 's';
  set_address(decoder, instruction, decoder.operand(loads ? 1 : 0));

  const Operand& values = decoder.operand(loads ? 0 : 1);
  const bool is_list = values.kind == Operand::Kind::kList;
  // `{ %r1 }` is a list too.
  if (is_list ? values.list.size() != instruction.count : instruction.count > 1) return false;
  // All registers have one width, which immediates take as well.
  instruction.width = static_cast<uint8_t>(std::max(bytes, 2));
  for (size_t k = 0; k < instruction.count; ++k) {
    const Operand& value = is_list ? values.list[k] : values;
    if (value.kind == Operand::Kind::kRegister)
      instruction.width = static_cast<uint8_t>(decoder.width(value.reg));
  }
  std::vector<int32_t> list;
  for (size_t k = 0; k < instruction.count; ++k) {
    const Operand& value = is_list ? values.list[k] : values;
    list.push_back(loads ? decoder.destination(value, instruction.width)
                         : decoder.source(value, instruction.width));
  }
  instruction.execute = handler_of(instruction, loads, constant, space);
  if (instruction.execute == nullptr) return false;
  decoder.set_list(list);
  decoder.emit(instruction);
  return true;
}

}  // namespace ptx
