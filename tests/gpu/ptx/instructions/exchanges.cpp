// Warp collectives: shfl, vote, redux, bar.warp.sync, activemask.
#include <string>

#include "../machine/memory.h"
#include "../machine/warp.h"
#include "decode.h"

namespace ptx {
namespace {

enum class Mode : uint8_t { kUp, kDown, kButterfly, kIndex };

template <Mode kMode>
void shuffle(Warp& warp, const Instruction& i) {
  const auto* a = warp.in<uint32_t>(i.a);
  const auto* b = warp.in<uint32_t>(i.b);
  const auto* c = warp.in<uint32_t>(i.c);
  alignas(64) uint32_t result[kLanes] = {};
  uint32_t valid = 0;
  for_lanes(warp.active, [&](int lane) {
    const int by = static_cast<int>(b[lane] & 31), clamp = static_cast<int>(c[lane] & 31);
    const int segment = static_cast<int>(c[lane] >> 8 & 31);
    const int last = (lane & segment) | (clamp & ~segment), first = lane & segment;
    int from = 0;
    bool in_range = true;
    switch (kMode) {
      case Mode::kUp:
        from = lane - by;
        in_range = from >= last;
        break;
      case Mode::kDown:
        from = lane + by;
        in_range = from <= last;
        break;
      case Mode::kButterfly:
        from = lane ^ by;
        in_range = from <= last;
        break;
      case Mode::kIndex:
        from = first | (by & ~segment);
        in_range = from <= last;
        break;
    }
    if (!in_range) from = lane;
    if ((warp.active >> from & 1) == 0) {
      fail(warp, lane, i.site, "shfl.sync from lane " + std::to_string(from) + ", which is not active");
    }
    valid |= uint32_t{in_range} << lane;
    result[lane] = a[from];
  });
  keep(warp, i.d, result);
  if (i.count != 0) warp.set_predicate(i.e, valid);
}

enum class Vote : uint8_t { kBallot, kAll, kAny, kUniform };

template <Vote kVote>
void vote(Warp& warp, const Instruction& i) {
  const uint32_t given = (i.is_signed ? ~warp.predicate(i.a) : warp.predicate(i.a)) & warp.active;
  if (kVote == Vote::kBallot) {
    alignas(64) uint32_t result[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) result[lane] = given;
    keep(warp, i.d, result);
  } else {
    const bool holds = kVote == Vote::kAll   ? given == warp.active
                       : kVote == Vote::kAny ? given != 0
                                             : given == 0 || given == warp.active;
    warp.set_predicate(i.d, holds ? kAllLanes : 0);
  }
}

enum class Reduction : uint8_t { kAdd, kMin, kMax, kAnd, kOr, kXor };

template <class T, Reduction kReduction>
void reduce(Warp& warp, const Instruction& i) {
  const auto* a = warp.in<T>(i.a);
  bool is_first = true;
  T total = 0;
  for_lanes(warp.active, [&](int lane) {
    const T value = a[lane];
    switch (kReduction) {
      case Reduction::kAdd:
        total = static_cast<T>(static_cast<uint32_t>(total) + static_cast<uint32_t>(value));
        break;
      case Reduction::kMin:
        total = is_first || value < total ? value : total;
        break;
      case Reduction::kMax:
        total = is_first || value > total ? value : total;
        break;
      case Reduction::kAnd:
        total = is_first ? value : total & value;
        break;
      case Reduction::kOr:
        total |= value;
        break;
      case Reduction::kXor:
        total ^= value;
        break;
    }
    is_first = false;
  });
  alignas(64) T result[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) result[lane] = total;
  keep(warp, i.d, result);
}

template <class T>
Handler find_reduction(std::string_view name) {
  if (name == "add") return reduce<T, Reduction::kAdd>;
  if (name == "min") return reduce<T, Reduction::kMin>;
  if (name == "max") return reduce<T, Reduction::kMax>;
  if (name == "and") return reduce<T, Reduction::kAnd>;
  if (name == "or") return reduce<T, Reduction::kOr>;
  return name == "xor" ? reduce<T, Reduction::kXor> : nullptr;
}

// Orders earlier accesses of the warp's lanes.
void sync_warp(Warp& warp, const Instruction&) {
  warp.epoch = warp.memory->advance();
  if (warp.block->async != nullptr) warp.memory->sync_lanes(warp);
}

void active_lanes(Warp& warp, const Instruction& i) {
  alignas(64) uint32_t result[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) result[lane] = warp.active;
  keep(warp, i.d, result);
}

bool decode_shuffle(Decoder& decoder, const Decoder::Words& words, Instruction& instruction) {
  const std::string_view mode = words[2];
  if (words[1] != "sync" || words.last() != "b32") return false;
  instruction.execute = mode == "up"     ? shuffle<Mode::kUp>
                        : mode == "down" ? shuffle<Mode::kDown>
                        : mode == "bfly" ? shuffle<Mode::kButterfly>
                        : mode == "idx"  ? shuffle<Mode::kIndex>
                                         : nullptr;
  const Operand& to = decoder.operand(0);
  if (to.kind == Operand::Kind::kPair) {
    instruction.d = decoder.destination(to.list[0], 4);
    instruction.e = decoder.destination(to.list[1], 0);
    instruction.count = 1;
  } else {
    instruction.d = decoder.destination(to, 4);
  }
  instruction.a = decoder.source(decoder.operand(1), 4);
  instruction.b = decoder.source(decoder.operand(2), 4);
  instruction.c = decoder.source(decoder.operand(3), 4);
  instruction.members = decoder.source(decoder.operand(4), 4);
  return instruction.execute != nullptr;
}

bool decode_vote(Decoder& decoder, const Decoder::Words& words, Instruction& instruction) {
  const std::string_view mode = words[2];
  if (words[1] != "sync") return false;
  instruction.execute = mode == "ballot" ? vote<Vote::kBallot>
                        : mode == "all"  ? vote<Vote::kAll>
                        : mode == "any"  ? vote<Vote::kAny>
                        : mode == "uni"  ? vote<Vote::kUniform>
                                         : nullptr;
  Operand given = decoder.operand(1);
  instruction.is_signed = given.negated;
  given.negated = false;
  instruction.d = decoder.destination(decoder.operand(0), mode == "ballot" ? 4 : 0);
  instruction.a = decoder.source(given, 0);
  instruction.members = decoder.source(decoder.operand(2), 4);
  return instruction.execute != nullptr;
}

}  // namespace

bool decode_exchange(Decoder& decoder, const Decoder::Words& words) {
  Instruction instruction = decoder.begin();
  instruction.kind = Kind::kCollective;
  if (words[0] == "shfl") {
    if (!decode_shuffle(decoder, words, instruction)) return false;
  } else if (words[0] == "vote") {
    if (!decode_vote(decoder, words, instruction)) return false;
  } else if (words[0] == "redux") {
    if (words[1] != "sync") return false;
    instruction.execute =
        words[3] == "s32" ? find_reduction<int32_t>(words[2]) : find_reduction<uint32_t>(words[2]);
    if (instruction.execute == nullptr) return false;
    instruction.d = decoder.destination(decoder.operand(0), 4);
    instruction.a = decoder.source(decoder.operand(1), 4);
    instruction.members = decoder.source(decoder.operand(2), 4);
  } else if (words[0] == "bar" && words[1] == "warp") {
    instruction.execute = sync_warp;
    instruction.members = decoder.source(decoder.operand(0), 4);
  } else if (words[0] == "activemask") {
    instruction.kind = Kind::kPlain;
    instruction.execute = active_lanes;
    instruction.d = decoder.destination(decoder.operand(0), 4);
  } else {
    return false;
  }
  decoder.emit(instruction);
  return true;
}

}  // namespace ptx
