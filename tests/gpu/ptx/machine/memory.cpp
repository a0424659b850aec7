#include "memory.h"

#include <sys/mman.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <new>

#include "machine.h"

namespace ptx {
namespace {

std::string hexadecimal(uint64_t address) {
  char text[32];
  std::snprintf(text, sizeof(text), "0x%llx", static_cast<unsigned long long>(address));
  return text;
}

bool is_write(Access access) { return access == Access::kWrite || access == Access::kAtomic; }

}  // namespace

void Memory::start_launch() {
  progress();
  global_.start_launch(advance(), grid.blocks);
  banks.start_launch(grid.sites->size());
  if (windows_ != nullptr) return;
  const auto reserve = [](int protection) {
    void* start = mmap(nullptr, kMaxResidentBlocks * kWindowStride, protection,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) throw std::bad_alloc();
    return static_cast<char*>(start);
  };
  // Reserved and not accessible: only the addresses are used.
  windows_ = reserve(PROT_NONE);
  storage_ = reserve(PROT_READ | PROT_WRITE);
}

void Memory::place(Block& block, int slot) {
  block.slot = slot;
  block.window = windows_ + slot * kWindowStride + kWindowStride / 2;
  block.storage = storage_ + slot * kWindowStride;
  block.shadow = std::make_unique<SharedShadow>(kMaxSharedBytes);
}

void Memory::start_block(Block& block) {
  std::memset(block.storage, 0xff, static_cast<size_t>(grid.shared_bytes));  // NaN in all types
  block.start = block.epoch = advance();
  block.acquired = block.threads_acquired = 0;
  bool copies_left = false;
  for (const auto& warp : block.warps) {
    warp->epoch = 0;
    warp->order.fill({});
    warp->groups.fill(0);
    for (auto& copies : warp->copies) {
      copies_left = copies_left || !copies.empty();
      copies.clear();
    }
  }
  const bool landings_left = block.async != nullptr && !block.async->has_returned;
  if (copies_left || landings_left || block.shadow->has_parts()) block.shadow->clear();
  block.async = nullptr;
  block.shadow->track_no_readers();
  if (!grid.entry->is_async) return;
  constexpr uint32_t kRegisters = 64 << 10, kUnit = 8, kMost = 255;  // of a multiprocessor
  const auto threads = static_cast<uint32_t>(std::max(grid.entry->max_threads, 1) * grid.entry->min_blocks);
  block.async =
      std::make_unique<AsyncBlock>(grid.threads, std::min(kRegisters / threads, kMost) / kUnit * kUnit);
  block.shadow->track_readers(static_cast<uint32_t>(block.warps.size()));
  for (auto& registers : block.async->registers) registers.start(grid.entry->register_count);
}

void Memory::check_aligned(const Warp& warp, const uint64_t (&addresses)[kLanes], int bytes, bool writes,
                           const Instruction& at) const {
  const auto mask = static_cast<uint64_t>(bytes - 1);
  uint64_t low = 0;
  for_lanes(warp.active, [&](int lane) { low |= addresses[lane]; });
  if ((low & mask) == 0) return;
  for_lanes(warp.active, [&](int lane) {
    if ((addresses[lane] & mask) == 0) return;
    fail(warp, lane, at.site,
         "misaligned " + std::string(writes ? "store" : "load") + " of " + std::to_string(bytes) +
             " bytes at " + hexadecimal(addresses[lane]));
  });
}

// ---- Global memory ------------------------------------------------------------------------------------

void Memory::find_global(Warp& warp, const uint64_t (&addresses)[kLanes], int bytes, Access access,
                         const Instruction& at, char* (&places)[kLanes]) {
  const bool writes = is_write(access), constant = access == Access::kReadConstant;
  check_aligned(warp, addresses, bytes, writes, at);
  for_lanes(warp.active, [&](int lane) {
    const uint64_t address = addresses[lane];
    constexpr uint64_t kFirst = 4096;
    if (address < kFirst) fail(warp, lane, at.site, "null pointer: an access at " + hexadecimal(address));
    if (in_windows(address))
      fail(warp, lane, at.site, "the address of shared memory used as one of global memory");
    const auto [other, with_read] = global_.note(address, bytes, warp, lane, tick_, at.site, access);
    if (other != nullptr) {
      const bool as_constant = constant || (with_read && other->constant);
      fail(warp, lane, at.site,
           std::string("race: ") + (writes ? "writes" : "reads") + " global memory that thread " +
               std::to_string(other->thread) + " of block " + std::to_string(other->block) +
               (with_read ? " read (" : " wrote (") + site_text(other->site) + ")" +
               (as_constant ? ", as constant" : " with nothing to order them"));
    }
    places[lane] = reinterpret_cast<char*>(address);
  });
  now = {&warp, &at, addresses, bytes};
  if (access == Access::kWrite) progress();
}

// ---- Shared memory ------------------------------------------------------------------------------------

uint64_t Memory::to_shared(const Warp& warp, int lane, uint64_t generic, const Instruction& at) const {
  if (!in_windows(generic)) fail(warp, lane, at.site, "this is not the address of shared memory");
  const uint64_t offset = generic - reinterpret_cast<uint64_t>(warp.block->window);
  return static_cast<uint32_t>(offset + static_cast<uint64_t>(options().first_shared_address));
}

uint64_t Memory::from_shared(const Warp& warp, int, uint64_t address, const Instruction&) const {
  const int64_t offset =
      static_cast<int32_t>(static_cast<uint32_t>(address)) - options().first_shared_address;
  return reinterpret_cast<uint64_t>(warp.block->window) + static_cast<uint64_t>(offset);
}

uint32_t Memory::shared_offset(const Warp& warp, int lane, uint64_t address, int64_t bytes,
                               const Instruction& at) const {
  const int64_t offset = static_cast<int64_t>(address) - options().first_shared_address;
  if (offset < 0 || offset + bytes > grid.shared_bytes) {
    fail(warp, lane, at.site,
         std::to_string(bytes) + " bytes at byte " + std::to_string(offset) +
             " of shared memory, which has " + std::to_string(grid.shared_bytes));
  }
  return static_cast<uint32_t>(offset);
}

void Memory::check(const SharedShadow::Conflict& conflict, const Warp& warp, int lane, bool writes,
                   const Instruction& at) const {
  using Why = SharedShadow::Why;
  if (conflict.why == Why::kNone) return;
  const SharedShadow::Cell cell = conflict.cell;
  const std::string actor = Units::is_unit(cell.actor())          ? "an asynchronous operation"
                            : cell.actor() >= SharedShadow::kWarp ? "other threads"
                                                                  : "thread " + std::to_string(cell.actor());
  const std::string line = " (" + site_text(cell.site()) + ")";
  const std::string mine =
      (writes ? "writes byte " : "reads byte ") + std::to_string(conflict.byte) + " of shared memory";
  if (conflict.why == Why::kUnwritten) fail(warp, lane, at.site, mine + ", which was not written");
  if (cell.tick() == SharedShadow::kInFlight) {
    fail(warp, lane, at.site, mine + ", where an asynchronous copy by " + actor + line + " is in flight");
  }
  if (conflict.why == Why::kUnfenced) {
    fail(warp, lane, at.site,
         mine + ", which " + actor + " wrote" + line + " without a fence.proxy.async after it");
  }
  fail(warp, lane, at.site,
       "race: " + mine + ", which " + actor + (conflict.why == Why::kRead ? " read" : " wrote") + line +
           " with no barrier between");
}

void Memory::find_shared(Warp& warp, const uint64_t (&addresses)[kLanes], int bytes, Access access,
                         const Instruction& at, char* (&places)[kLanes], const Values* values) {
  const bool writes = is_write(access);
  check_aligned(warp, addresses, bytes, writes, at);
  uint32_t offsets[kLanes];
  SharedShadow& shadow = *warp.block->shadow;
  SharedAccess mine = as_access(warp, 0, at.site);
  for_lanes(warp.active, [&](int lane) {
    const uint32_t offset = shared_offset(warp, lane, addresses[lane], bytes, at);
    mine.thread = static_cast<uint16_t>(thread_of(warp, lane));
    set_clock(mine, warp, lane);
    const auto size = static_cast<uint32_t>(bytes);
    places[lane] = warp.block->storage + offset;
    if (values != nullptr) {
      mine.value = (*values)[lane];
      mine.there = places[lane];
    }
    check(writes ? shadow.write(offset, size, mine) : shadow.read(offset, size, mine), warp, lane, writes,
          at);
    offsets[lane] = offset;
    if (values != nullptr) std::memcpy(places[lane], (*values)[lane], size);
  });
  banks.add(offsets, warp.active, bytes, at.site);
}

void Memory::find_generic(Warp& warp, const uint64_t (&addresses)[kLanes], int bytes, Access access,
                          const Instruction& at, char* (&places)[kLanes]) {
  uint32_t shared = 0;
  uint64_t converted[kLanes];
  for_lanes(warp.active, [&](int lane) {
    if (!in_windows(addresses[lane])) return;
    shared |= 1u << lane;
    converted[lane] = to_shared(warp, lane, addresses[lane], at);
  });
  const uint32_t all = warp.active;
  if (shared != 0) {
    warp.active = shared;
    find_shared(warp, converted, bytes, access, at, places);
  }
  if (shared != all) {
    warp.active = all & ~shared;
    find_global(warp, addresses, bytes, access, at, places);
  }
  warp.active = all;
}

}  // namespace ptx
