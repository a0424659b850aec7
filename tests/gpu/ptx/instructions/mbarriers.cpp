// mbarriers: phases that threads and asynchronous copies complete, and that threads poll for. An arrival
// releases what its thread has done, and a successful wait acquires what the arrivals of the completed phases
// released.
#include <string>

#include "../machine/memory.h"
#include "../machine/warp.h"
#include "decode.h"

namespace ptx {

void Memory::release_to(Clock& clock, Warp& warp, int lane) {
  Clock& mine = clock_of(warp, lane);
  mine.know(static_cast<uint16_t>(thread_of(warp, lane)), advance());
  clock.join(mine);
}

void Memory::sync_lanes(Warp& warp) {
  Clock all(grid.threads);
  for_lanes(warp.active, [&](int lane) { release_to(all, warp, lane); });
  for_lanes(warp.active, [&](int lane) { clock_of(warp, lane).join(all); });
}

namespace {

constexpr int64_t kMbarrierBytes = 8;

// A barrier that just got what it waited for, maybe.
void settle(Memory& memory, Mbarrier& barrier) {
  if (!barrier.is_done()) return;
  barrier.next_phase();
  memory.progress();
}

uint32_t offset_of(const Warp& warp, const Mbarrier& barrier) {
  for (const auto& [offset, each] : warp.block->async->barriers) {
    if (&each == &barrier) return offset;
  }
  return 0;
}

}  // namespace

void Memory::make_mbarrier(Warp& warp, int lane, uint64_t address, uint32_t count, const Instruction& at) {
  AsyncBlock& async = *warp.block->async;
  if (count == 0 || count > Mbarrier::kMaxCount) {
    fail(warp, lane, at.site, "mbarrier.init with a count of " + std::to_string(count));
  }
  if (address % kMbarrierBytes != 0) fail(warp, lane, at.site, "a misaligned mbarrier");
  const uint32_t offset = shared_offset(warp, lane, address, kMbarrierBytes, at);
  if (async.barriers.count(offset) != 0) {
    fail(warp, lane, at.site,
         "mbarrier.init of " + async.barriers[offset].text(offset) + ", without mbarrier.inval");
  }
  if (async.barriers_made == Units::kBarriers)
    fail(warp, lane, at.site, "more mbarriers than the machine has");
  check(warp.block->shadow->write(offset, kMbarrierBytes, as_access(warp, lane, at.site)), warp, lane, true,
        at);
  Mbarrier& barrier = async.barriers[offset];
  barrier.expected = barrier.pending = count;
  barrier.arriving = barrier.completed = Clock(grid.threads);
  barrier.index = async.barriers_made++;
  barrier.made = tick_;
  barrier.maker = static_cast<uint16_t>(thread_of(warp, lane));
}

Mbarrier& Memory::mbarrier_of(Warp& warp, int lane, uint64_t address, const Instruction& at) {
  const uint32_t offset = shared_offset(warp, lane, address, kMbarrierBytes, at);
  const auto found = warp.block->async->barriers.find(offset);
  if (found == warp.block->async->barriers.end()) {
    fail(warp, lane, at.site, "there is no mbarrier at byte " + std::to_string(offset) + " of shared memory");
  }
  Mbarrier& barrier = found->second;
  if (barrier.maker != thread_of(warp, lane) && barrier.made >= clock_of(warp, lane).known(barrier.maker)) {
    fail(warp, lane, at.site,
         "race: uses an mbarrier that thread " + std::to_string(barrier.maker) +
             " made, with no barrier between");
  }
  return barrier;
}

void Memory::arrive(Warp& warp, int lane, Mbarrier& barrier, uint32_t count, const Instruction& at) {
  if (count == 0 || count > barrier.pending) {
    fail(warp, lane, at.site,
         std::to_string(count) + " arrivals at " + barrier.text(offset_of(warp, barrier)));
  }
  release_to(barrier.arriving, warp, lane);
  barrier.pending -= count;
  settle(*this, barrier);
}

void Memory::expect_bytes(const Warp& warp, int lane, Mbarrier& barrier, int64_t bytes,
                          const Instruction& at) {
  barrier.bytes += bytes;
  if (barrier.bytes > Mbarrier::kMaxBytes || barrier.bytes < -Mbarrier::kMaxBytes) {
    fail(warp, lane, at.site, "too many bytes at " + barrier.text(offset_of(warp, barrier)));
  }
}

// The arrival comes when the thread's copies so far have landed, which nobody else waits for.
void Memory::arrive_after_copies(Warp& warp, int lane, uint64_t address, bool is_counted,
                                 const Instruction& at) {
  Mbarrier& barrier = mbarrier_of(warp, lane, address, at);
  if (!is_counted) ++barrier.pending;
  ++barrier.in_flight;
  const uint32_t last = warp.block->async->copies;
  Mbarrier* const to = &barrier;
  Warp* const by = &warp;
  const Instruction* const instruction = &at;
  const auto land_all = [this, by, lane, to, last, instruction] {
    const uint16_t unit = Units::copy(to->index);
    auto& copies = by->copies[static_cast<size_t>(lane)];
    size_t landed = 0;
    while (landed < copies.size() && copies[landed].number <= last) {
      land(*by, lane, copies[landed++], unit, instruction->site);
    }
    copies.erase(copies.begin(), copies.begin() + static_cast<int64_t>(landed));
    --to->in_flight;
    to->arriving.know(unit, advance());
    if (to->pending == 0) {
      fail(*by, lane, instruction->site, "an arrival too many at " + to->text(offset_of(*by, *to)));
    }
    --to->pending;
    settle(*this, *to);
  };
  warp.block->async->landings.push_back({land_all, static_cast<uint32_t>(thread_of(warp, lane)), at.site});
}

namespace {

// ---- Handlers -----------------------------------------------------------------------------------------

// Calls `of` with each active lane and its address of shared memory.
template <class Of>
void for_barriers(Warp& warp, const Instruction& i, const Of& of) {
  uint64_t addresses[kLanes];
  read_addresses(warp, i, addresses);
  for_lanes(warp.active, [&](int lane) {
    const uint64_t address =
        i.is_signed ? warp.memory->to_shared(warp, lane, addresses[lane], i) : addresses[lane];
    of(lane, address);
  });
}

void init(Warp& warp, const Instruction& i) {
  const auto* count = warp.in<uint32_t>(i.b);
  for_barriers(warp, i, [&](int lane, uint64_t address) {
    warp.memory->make_mbarrier(warp, lane, address, count[lane], i);
  });
}

void invalidate(Warp& warp, const Instruction& i) {
  for_barriers(warp, i, [&](int lane, uint64_t address) {
    const Mbarrier& barrier = warp.memory->mbarrier_of(warp, lane, address, i);
    if (barrier.in_flight != 0)
      fail(warp, lane, i.site, "mbarrier.inval of one that copies in flight will arrive at");
    warp.block->async->barriers.erase(warp.memory->shared_place(warp, lane, address, kMbarrierBytes, i));
  });
}

// In count: whether the result is wanted, a number of arrivals given, bytes given.
constexpr uint8_t kToken = 1, kArrivals = 2, kBytes = 4;

void arrive(Warp& warp, const Instruction& i) {
  const auto* given = warp.in<uint32_t>(i.b);
  alignas(64) uint64_t token[kLanes] = {};
  for_barriers(warp, i, [&](int lane, uint64_t address) {
    Mbarrier& barrier = warp.memory->mbarrier_of(warp, lane, address, i);
    token[lane] = barrier.phase;
    if ((i.count & kBytes) != 0) warp.memory->expect_bytes(warp, lane, barrier, given[lane], i);
    warp.memory->arrive(warp, lane, barrier, (i.count & kArrivals) != 0 ? given[lane] : 1, i);
  });
  if ((i.count & kToken) != 0) keep(warp, i.d, token);
}

template <int kSign>
void count_bytes(Warp& warp, const Instruction& i) {
  const auto* bytes = warp.in<uint32_t>(i.b);
  for_barriers(warp, i, [&](int lane, uint64_t address) {
    Mbarrier& barrier = warp.memory->mbarrier_of(warp, lane, address, i);
    warp.memory->expect_bytes(warp, lane, barrier, kSign * int64_t{bytes[lane]}, i);
    settle(*warp.memory, barrier);
  });
}

// By parity or by the token of an arrival.
template <bool kParity>
void test_wait(Warp& warp, const Instruction& i) {
  uint32_t passed = 0;
  Mbarrier* waited_for = nullptr;
  for_barriers(warp, i, [&](int lane, uint64_t address) {
    Mbarrier& barrier = warp.memory->mbarrier_of(warp, lane, address, i);
    const bool done = kParity ? barrier.passed(warp.in<uint32_t>(i.b)[lane] & 1)
                              : barrier.phase > warp.in<uint64_t>(i.b)[lane];
    if (done) {
      passed |= 1u << lane;
      clock_of(warp, lane).join(barrier.completed);
      return;
    }
    waited_for = &barrier;
  });
  if (waited_for != nullptr) {
    warp.memory->count_poll(
        warp, __builtin_ctz(warp.active & ~passed),
        [&] { return waited_for->text(offset_of(warp, *waited_for)); }, i);
  }
  warp.set_predicate(i.d, passed);
}

template <bool kCounted>
void arrive_after_copies(Warp& warp, const Instruction& i) {
  for_barriers(warp, i, [&](int lane, uint64_t address) {
    warp.memory->arrive_after_copies(warp, lane, address, kCounted, i);
  });
}

bool is_space(std::string_view word) {
  return word == "shared" || word == "shared::cta" || word == "shared::cluster";
}

// Sets the address, which is generic if no space is named.
void set_barrier(Decoder& decoder, Instruction& instruction, const Decoder::Words& words, size_t operand) {
  bool generic = true;
  for (const std::string_view word : words.parts) generic = generic && !is_space(word);
  set_address(decoder, instruction, decoder.operand(operand));
  instruction.is_signed = generic;
}

bool decode_arrival(Decoder& decoder, const Decoder::Words& words, Instruction& instruction) {
  const bool expects = words.has("expect_tx");
  const size_t operands = decoder.statement().operands.size();
  if (words.has("noComplete") || words.has("relaxed")) return false;
  const bool has_token = decoder.operand(0).kind != Operand::Kind::kAddress;
  const size_t first = has_token ? 1 : 0;
  if (operands > first + 2 || (expects && operands != first + 2)) return false;
  if (has_token && decoder.operand(0).kind != Operand::Kind::kSink) {
    instruction.count |= kToken;
    instruction.d = decoder.destination(decoder.operand(0), 8);
  }
  set_barrier(decoder, instruction, words, first);
  if (operands == first + 2) {
    instruction.b = decoder.source(decoder.operand(first + 1), 4);
    instruction.count |= expects ? kBytes : kArrivals;
  }
  instruction.execute = arrive;
  return true;
}

}  // namespace

bool decode_mbarrier(Decoder& decoder, const Decoder::Words& words) {
  Instruction instruction = decoder.begin();
  instruction.kind = Kind::kAtomic;
  const std::string_view operation = words[1];
  if (words[0] == "cp" && operation == "async" && words[2] == "mbarrier" && words[3] == "arrive") {
    set_barrier(decoder, instruction, words, 0);
    instruction.execute = words.has("noinc") ? arrive_after_copies<true> : arrive_after_copies<false>;
  } else if (words[0] != "mbarrier" || words.last() != "b64") {
    return false;
  } else if (operation == "init") {
    set_barrier(decoder, instruction, words, 0);
    instruction.b = decoder.source(decoder.operand(1), 4);
    instruction.execute = init;
  } else if (operation == "inval") {
    set_barrier(decoder, instruction, words, 0);
    instruction.execute = invalidate;
  } else if (operation == "arrive") {
    if (!decode_arrival(decoder, words, instruction)) return false;
  } else if (operation == "expect_tx" || operation == "complete_tx") {
    set_barrier(decoder, instruction, words, 0);
    instruction.b = decoder.source(decoder.operand(1), 4);
    instruction.execute = operation == "expect_tx" ? count_bytes<1> : count_bytes<-1>;
  } else if (operation == "try_wait" || operation == "test_wait") {
    const bool by_parity = words.has("parity");
    if (words.has("relaxed")) return false;
    instruction.d = decoder.destination(decoder.operand(0), 0);
    set_barrier(decoder, instruction, words, 1);
    instruction.b = decoder.source(decoder.operand(2), by_parity ? 4 : 8);
    instruction.execute = by_parity ? test_wait<true> : test_wait<false>;
  } else {
    return false;
  }
  decoder.emit_async(instruction);
  return true;
}

}  // namespace ptx
