// atom, red and fences: ordering between blocks.
//
// A releasing atomic publishes its thread's accesses, and those ordered before them by barriers; an acquiring
// one orders all earlier releases before its thread. A relaxed atomic does so with fences: it releases what
// the fence before it covers, and the fence after it acquires.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <string>

#include "../machine/memory.h"
#include "../machine/warp.h"
#include "decode.h"

namespace ptx {

void Memory::release(Warp& warp, int lane, bool relaxed) {
  const ThreadOrder& order = warp.order[static_cast<size_t>(lane)];
  if (!relaxed) {
    const bool has_clock = warp.block->async != nullptr;
    global_.release(warp, lane, tick_, tick_, warp.block->epoch, has_clock ? &clock_of(warp, lane) : nullptr);
  } else if (order.fenced != 0) {
    const bool has_clock = warp.block->async != nullptr;
    global_.release(warp, lane, tick_, order.fenced, order.fence_epoch,
                    has_clock ? &warp.block->async->fences[thread_of(warp, lane)] : nullptr);
  }
}

void Memory::acquire(Warp& warp, int lane, bool relaxed) {
  ThreadOrder& order = warp.order[static_cast<size_t>(lane)];
  order.read = tick_;
  if (relaxed) return;
  order.acquired = warp.block->threads_acquired = tick_;
  if (warp.block->async != nullptr) clock_of(warp, lane).acquired = tick_;
}

void Memory::fence(Warp& warp, int lane) {
  ThreadOrder& order = warp.order[static_cast<size_t>(lane)];
  order.fenced = advance();
  order.fence_epoch = warp.block->epoch;
  if (warp.block->async != nullptr) warp.block->async->fences[thread_of(warp, lane)] = clock_of(warp, lane);
  if (order.read != 0) {
    order.acquired = std::max(order.acquired, order.read);
    if (warp.block->async != nullptr) {
      Clock& clock = clock_of(warp, lane);
      clock.acquired = std::max(clock.acquired, order.read);
    }
    warp.block->threads_acquired = std::max(warp.block->threads_acquired, order.read);
  }
}

void Memory::count_atomic(const Warp& warp, const Instruction& at) {
  constexpr int64_t kPatience = 1000000;
  if (++atomics_since_progress_ > kPatience) {
    fail(warp, warp.active, at,
         "deadlock: waits for a counter, and nothing else has happened for a million atomics");
  }
}

namespace {

enum class Operation : uint8_t { kAdd, kMin, kMax, kAnd, kOr, kXor, kExchange, kCompare };

template <class T, Operation kOperation>
T apply(T old, T operand, T other) {
  switch (kOperation) {
    case Operation::kAdd:
      return static_cast<T>(old + operand);
    case Operation::kMin:
      return std::min(old, operand);
    case Operation::kMax:
      return std::max(old, operand);
    case Operation::kExchange:
      return operand;
    case Operation::kCompare:
      return old == operand ? other : old;
    default:
      if constexpr (std::is_integral_v<T>) {
        if (kOperation == Operation::kAnd) return old & operand;
        if (kOperation == Operation::kOr) return old | operand;
        if (kOperation == Operation::kXor) return old ^ operand;
      }
      return old;
  }
}

struct Ordering {
  bool releases, acquires;
};
Ordering ordering_of(const Instruction& i) { return {(i.target & 1) != 0, (i.target & 2) != 0}; }

// The lanes run one after the other.
template <class T, Operation kOperation>
void atomic(Warp& warp, const Instruction& i) {
  Memory& memory = *warp.memory;
  uint64_t addresses[kLanes];
  read_addresses(warp, i, addresses);
  const auto* operand = warp.in<T>(i.b);
  const auto* other = warp.in<T>(i.c);
  const uint32_t all = warp.active;
  const Ordering ordering = ordering_of(i);
  alignas(64) T result[kLanes] = {};
  for_lanes(all, [&](int lane) {
    warp.active = 1u << lane;
    memory.count_atomic(warp, i);
    char* places[kLanes];
    memory.find_global(warp, addresses, sizeof(T), Access::kAtomic, i, places);
    memory.advance();
    memory.release(warp, lane, !ordering.releases);
    memory.acquire(warp, lane, !ordering.acquires);
    T old;
    std::memcpy(&old, places[lane], sizeof(T));
    const T value = apply<T, kOperation>(old, operand[lane], other[lane]);
    std::memcpy(places[lane], &value, sizeof(T));
    result[lane] = old;
    memory.now = {};
  });
  warp.active = all;
  if (i.count != 0) keep(warp, i.d, result);
}

void fence_lanes(Warp& warp, const Instruction&) {
  for_lanes(warp.active, [&](int lane) { warp.memory->fence(warp, lane); });
}
void no_operation(Warp&, const Instruction&) {}

template <class T>
Handler find_atomic(std::string_view name) {
  if (name == "add") return atomic<T, Operation::kAdd>;
  if (name == "min") return atomic<T, Operation::kMin>;
  if (name == "max") return atomic<T, Operation::kMax>;
  if (name == "exch") return atomic<T, Operation::kExchange>;
  if (name == "cas") return atomic<T, Operation::kCompare>;
  if constexpr (std::is_integral_v<T>) {
    if (name == "and") return atomic<T, Operation::kAnd>;
    if (name == "or") return atomic<T, Operation::kOr>;
    if (name == "xor") return atomic<T, Operation::kXor>;
  }
  return nullptr;
}
Handler find_atomic(std::string_view name, std::string_view type) {
  if (type == "u32" || type == "b32") return find_atomic<uint32_t>(name);
  if (type == "s32") return find_atomic<int32_t>(name);
  if (type == "u64" || type == "b64") return find_atomic<uint64_t>(name);
  if (type == "s64") return find_atomic<int64_t>(name);
  if (type == "f32") return find_atomic<float>(name);
  return type == "f64" ? find_atomic<double>(name) : nullptr;
}

bool decode_fence(Decoder& decoder, const Decoder::Words& words) {
  Instruction instruction = decoder.begin();
  // Block scope: blocks order with barriers.
  const bool in_block = words.last() == "cta";
  const bool is_known = words[0] == "membar"  ? words.parts.size() == 2
                        : words[0] == "fence" ? words[1] == "acq_rel" || words[1] == "sc"
                                              : false;
  if (!is_known) return false;
  instruction.execute = in_block ? no_operation : fence_lanes;
  decoder.emit(instruction);
  return true;
}

}  // namespace

bool decode_ordering(Decoder& decoder, const Decoder::Words& words) {
  const bool returns = words[0] == "atom";
  if (!returns && words[0] != "red") return decode_fence(decoder, words);
  Instruction instruction = decoder.begin();
  instruction.kind = Kind::kAtomic;
  instruction.count = returns ? 1 : 0;
  bool is_global = false;
  std::string_view operation;
  for (size_t k = 1; k + 1 < words.parts.size(); ++k) {
    const std::string_view word = words[k];
    if (word == "global") {
      is_global = true;
    } else if (word == "acq_rel") {
      instruction.target = 3;
    } else if (word == "release") {
      instruction.target = 1;
    } else if (word == "acquire") {
      instruction.target = 2;
    } else if (word == "cta") {
      return false;  // block-scope atomics: not used by these kernels
    } else if (word != "gpu" && word != "sys" && word != "relaxed") {
      operation = word;
    }
  }
  instruction.execute = is_global ? find_atomic(operation, words.last()) : nullptr;
  const size_t first = returns ? 1 : 0, count = operation == "cas" ? 3 : 2;
  if (instruction.execute == nullptr || decoder.statement().operands.size() != first + count) return false;
  const int bytes = bytes_of_type(words.last());
  if (returns) instruction.d = decoder.destination(decoder.operand(0), bytes);
  set_address(decoder, instruction, decoder.operand(first));
  instruction.b = decoder.source(decoder.operand(first + 1), bytes);
  instruction.c = count == 3 ? decoder.source(decoder.operand(first + 2), bytes) : instruction.b;
  decoder.emit(instruction);
  return true;
}

}  // namespace ptx
