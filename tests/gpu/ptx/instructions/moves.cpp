// mov, cvta, and packing and unpacking of registers.
#include <array>
#include <string>

#include "../machine/lanes.h"
#include "../machine/machine.h"
#include "../machine/memory.h"
#include "decode.h"

namespace ptx {
namespace {

struct Same {
  template <class T>
  T operator()(T a) const {
    return a;
  }
};

enum class Special : uint32_t {
  kThread,
  kThreads,
  kBlockX,
  kBlockY,
  kBlockZ,
  kBlocksX,
  kBlocksY,
  kBlocksZ,
  kLane,
  kLanesBefore,
  kWarp,
  kZero,
  kOne
};

void read_special(Warp& warp, const Instruction& i) {
  alignas(64) uint32_t result[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    uint32_t value = 0;
    switch (static_cast<Special>(i.target)) {
      case Special::kThread:
        value = static_cast<uint32_t>(thread_of(warp, lane));
        break;
      case Special::kThreads:
        value = grid.threads;
        break;
      case Special::kBlockX:
        value = static_cast<uint32_t>(warp.block->index) % grid.blocks_x;
        break;
      case Special::kBlockY:
        value = static_cast<uint32_t>(warp.block->index) / grid.blocks_x % grid.blocks_y;
        break;
      case Special::kBlockZ:
        value = static_cast<uint32_t>(warp.block->index) / grid.blocks_x / grid.blocks_y;
        break;
      case Special::kBlocksX:
        value = grid.blocks_x;
        break;
      case Special::kBlocksY:
        value = grid.blocks_y;
        break;
      case Special::kBlocksZ:
        value = grid.blocks / grid.blocks_x / grid.blocks_y;
        break;
      case Special::kLane:
        value = static_cast<uint32_t>(lane);
        break;
      case Special::kLanesBefore:
        value = (uint32_t{1} << lane) - 1;
        break;
      case Special::kWarp:
        value = static_cast<uint32_t>(warp.index);
        break;
      case Special::kZero:
        break;
      case Special::kOne:
        value = 1;
        break;
    }
    result[lane] = value;
  }
  keep(warp, i.d, result);
}

bool find_special(std::string_view name, Special& special) {
  struct Known {
    std::string_view name;
    Special special;
  };
  static constexpr Known kKnown[] = {
      {"%tid.x", Special::kThread},
      {"%ntid.x", Special::kThreads},
      {"%ctaid.x", Special::kBlockX},
      {"%nctaid.x", Special::kBlocksX},
      {"%laneid", Special::kLane},
      {"%warpid", Special::kWarp},
      {"%tid.y", Special::kZero},
      {"%tid.z", Special::kZero},
      {"%ctaid.y", Special::kBlockY},
      {"%ctaid.z", Special::kBlockZ},
      {"%ntid.y", Special::kOne},
      {"%ntid.z", Special::kOne},
      {"%nctaid.y", Special::kBlocksY},
      {"%nctaid.z", Special::kBlocksZ},
      {"%lanemask_lt", Special::kLanesBefore},
  };
  for (const Known& known : kKnown) {
    if (known.name == name) {
      special = known.special;
      return true;
    }
  }
  return false;
}

// Packs {a, b, ..} into one register, the first lowest; and unpacks.
template <class Whole, class Part>
void join(Warp& warp, const Instruction& i) {
  alignas(64) Whole result[kLanes] = {};
  for (size_t part = 0; part < sizeof(Whole) / sizeof(Part); ++part) {
    const auto* from = warp.in<Part>(i.list[part]);
    for (int lane = 0; lane < kLanes; ++lane) result[lane] |= Whole{from[lane]} << 8 * sizeof(Part) * part;
  }
  keep(warp, i.d, result);
}
template <class Whole, class Part>
void part(Warp& warp, const Instruction& i) {
  alignas(64) Whole whole[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) whole[lane] = warp.in<Whole>(i.a)[lane];
  for (size_t part = 0; part < sizeof(Whole) / sizeof(Part); ++part) {
    alignas(64) Part result[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) {
      result[lane] = static_cast<Part>(whole[lane] >> 8 * sizeof(Part) * part);
    }
    keep(warp, i.list[part], result);
  }
}

bool decode_parts(Decoder& decoder, int bytes) {
  Instruction instruction = decoder.begin();
  const bool joins = decoder.operand(1).kind == Operand::Kind::kList;
  const std::vector<Operand>& parts = decoder.operand(joins ? 1 : 0).list;
  const int part_bytes = bytes / static_cast<int>(parts.size());
  std::vector<int32_t> list;
  for (const Operand& each : parts) {
    list.push_back(joins ? decoder.source(each, part_bytes) : decoder.destination(each, part_bytes));
  }
  if (joins) {
    instruction.d = decoder.destination(decoder.operand(0), bytes);
  } else {
    instruction.a = decoder.source(decoder.operand(1), bytes);
  }
  if (bytes == 4 && part_bytes == 2) {
    instruction.execute = joins ? join<uint32_t, uint16_t> : part<uint32_t, uint16_t>;
  } else if (bytes == 8 && part_bytes == 4) {
    instruction.execute = joins ? join<uint64_t, uint32_t> : part<uint64_t, uint32_t>;
  } else if (bytes == 8 && part_bytes == 2) {
    instruction.execute = joins ? join<uint64_t, uint16_t> : part<uint64_t, uint16_t>;
  } else {
    return false;
  }
  decoder.set_list(list);
  decoder.emit(instruction);
  return true;
}

Handler copy_of(int bytes) {
  return bytes == 2   ? unary<Same, uint16_t, uint16_t>
         : bytes == 4 ? unary<Same, uint32_t, uint32_t>
                      : unary<Same, uint64_t, uint64_t>;
}

// Generic addresses of global memory are its own addresses; those of shared memory are in the block's window.
template <bool kToShared>
void convert_address(Warp& warp, const Instruction& i) {
  const auto* a = warp.in<uint64_t>(i.a);
  alignas(64) uint64_t result[kLanes] = {};
  for_lanes(warp.active, [&](int lane) {
    result[lane] = kToShared ? warp.memory->to_shared(warp, lane, a[lane], i)
                             : warp.memory->from_shared(warp, lane, a[lane], i);
  });
  keep(warp, i.d, result);
}

// Of a parameter, whose address so far was its offset.
void parameter_address(Warp& warp, const Instruction& i) {
  const auto* a = warp.in<uint64_t>(i.a);
  alignas(64) uint64_t result[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    result[lane] = a[lane] + reinterpret_cast<uint64_t>(grid.parameters.data());
  }
  keep(warp, i.d, result);
}

bool decode_cvta(Decoder& decoder, const Decoder::Words& words) {
  const bool to = words[1] == "to";
  const std::string_view space = words[to ? 2 : 1];
  if (words.last() != "u64") return false;
  Instruction instruction = decoder.begin();
  instruction.d = decoder.destination(decoder.operand(0), 8);
  const Operand& from = decoder.operand(1);
  instruction.a = from.kind == Operand::Kind::kName ? decoder.address_of(from.name, 8, from.value)
                                                    : decoder.source(from, 8);
  if (space == "shared") {
    instruction.execute = to ? convert_address<true> : convert_address<false>;
  } else if (space == "param" && !to) {
    instruction.execute = parameter_address;
  } else if (space == "global" || space == "const") {
    instruction.execute = copy_of(8);
  } else {
    return false;
  }
  decoder.emit(instruction);
  return true;
}

}  // namespace

bool decode_move(Decoder& decoder, const Decoder::Words& words) {
  if (words[0] == "cvta") return decode_cvta(decoder, words);
  if (words[0] != "mov" || words.parts.size() != 2) return false;
  const int bytes = bytes_of_type(words[1]);
  if (bytes < 2 || bytes > 8) return false;
  const Operand& from = decoder.operand(1);
  using Kind = Operand::Kind;
  if (from.kind == Kind::kList || decoder.operand(0).kind == Kind::kList) return decode_parts(decoder, bytes);
  Instruction instruction = decoder.begin();
  instruction.d = decoder.destination(decoder.operand(0), bytes);
  Special special;
  if (from.kind == Kind::kName && find_special(from.name, special)) {
    if (bytes != 4) return false;
    instruction.execute = read_special;
    instruction.target = static_cast<uint32_t>(special);
  } else {
    instruction.execute = copy_of(bytes);
    instruction.a = from.kind == Kind::kName ? decoder.address_of(from.name, bytes, from.value)
                                             : decoder.source(from, bytes);
  }
  decoder.emit(instruction);
  return true;
}

}  // namespace ptx
