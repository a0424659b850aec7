// Race detector of shared memory: records the last write and read of each word of a block's shared memory, to
// find accesses that no barrier orders. Words accessed in parts are recorded bytewise.
//
// Time is counted in ticks: the barriers and atomics completed anywhere. Accesses before the tick of the
// block's last barrier are ordered before its threads' current ones; accesses of a warp's lanes before its
// last bar.warp.sync are ordered for that warp. Ticks never repeat, so nothing has to be cleared between
// blocks.
//
// Where threads have a Clock, that decides as well, and the last read of each warp is recorded, because one
// reader may be ordered before a write and another not.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "clocks.h"

namespace ptx {

struct SharedAccess {
  uint32_t now, block_start, block_epoch, warp_epoch;  // ticks
  uint16_t site, thread;
  // For writes that may be repeated by others with the same value: what is written, and what is there.
  const char* value = nullptr;
  const char* there = nullptr;
  const Clock* clock = nullptr;  // of the thread
  uint32_t began = 0;            // with a clock: tick of the block's start
};

class SharedShadow {
 public:
  // A recorded access. `actor` is a thread, or several readers: kWarp and its index for one warp, kReaders
  // for any.
  struct Cell {
    uint64_t bits = 0;  // tick, site, actor: compared as one integer, the later is greater

    static Cell of(uint32_t tick, uint16_t site, uint16_t actor) {
      return {uint64_t{tick} << 32 | uint64_t{site} << 16 | actor};
    }
    uint32_t tick() const { return static_cast<uint32_t>(bits >> 32); }
    uint16_t site() const { return static_cast<uint16_t>(bits >> 16); }
    uint16_t actor() const { return static_cast<uint16_t>(bits); }
  };
  static constexpr uint16_t kReaders = 0x8000, kWarp = 0x4000;
  // The tick of a pending asynchronous write.
  static constexpr uint32_t kInFlight = UINT32_MAX;

  enum class Why : uint8_t { kNone, kWrote, kRead, kUnwritten, kUnfenced };
  struct Conflict {
    Why why = Why::kNone;
    uint32_t byte = 0;
    Cell cell;
  };

  explicit SharedShadow(int64_t bytes) : words_(static_cast<size_t>((bytes + 3) / 4)) {}

  // From now on, accesses have clocks.
  void track_readers(uint32_t warps) {
    readers_per_word_ = warps + Units::kWarpgroups;
    readers_.assign(words_.size() * readers_per_word_, {});
  }
  void track_no_readers() { readers_.clear(); }

  // Records a read, or returns the conflict.
  Conflict read(uint32_t offset, uint32_t bytes, const SharedAccess& access) {
    const uint64_t epoch = first_relevant(access);
    if (bytes < 4) return read_local_rows(offset, bytes, access);
    for (uint32_t at = offset; at < offset + bytes; at += 4) {
      Word& word = words_[at / 4];
      if (word.write.tick() == kParted) {
        const Conflict conflict = read_local_rows(at, 4, access);
        if (conflict.why != Why::kNone) return conflict;
        continue;
      }
      if (word.write.tick() < access.block_start) return {Why::kUnwritten, at, word.write};
      if (word.write.bits >= epoch && !ordered(word.write, access)) return {Why::kWrote, at, word.write};
      note_reader(word.read, at, access);
    }
    return {};
  }

  // Records a read by a warpgroup's unit, whose threads have `access.clock` in common, or returns the
  // conflict.
  Conflict read_by_unit(uint32_t offset, uint32_t bytes, const SharedAccess& access, int warpgroup) {
    for (uint32_t at = offset; at < offset + bytes; ++at) {
      const bool parted = words_[at / 4].write.tick() == kParted;
      const Cell write = parted ? parts_[at].write : words_[at / 4].write;
      const Why why = unit_conflict(write, access);
      if (why != Why::kNone) return {why, at, write};
      if (!parted) at |= 3;
    }
    for (uint32_t at = offset; at < offset + bytes; at += 4) {
      reader(at, readers_per_word_ - Units::kWarpgroups + static_cast<uint32_t>(warpgroup)) =
          Cell::of(access.now, access.site, Units::warpgroup(warpgroup));
    }
    return {};
  }

  // Records a write, or returns the conflict. `lands_later`: by an asynchronous copy; written() is called
  // when it has landed.
  Conflict write(uint32_t offset, uint32_t bytes, const SharedAccess& access, bool lands_later = false) {
    const uint64_t epoch = first_relevant(access);
    const Cell mine = Cell::of(lands_later ? kInFlight : access.now, access.site, access.thread);
    if (bytes < 4) return write_part(offset, bytes, access, mine);
    for (uint32_t at = offset; at < offset + bytes; at += 4) {
      Word& word = words_[at / 4];
      if (word.write.tick() == kParted) {
        const Conflict conflict = write_part(at, 4, access, mine, at - offset);
        if (conflict.why != Why::kNone) return conflict;
        continue;
      }
      if (word.write.bits >= epoch && !ordered(word.write, access) &&
          !is_same(word.write, access, at - offset, 4)) {
        return {Why::kWrote, at, word.write};
      }
      const Cell other = unordered_reader(word.read, epoch, at, access);
      if (other.bits != 0) return {Why::kRead, at, other};
      word.write = mine;
    }
    return {};
  }
  void written(uint32_t offset, uint32_t bytes, const SharedAccess& access) {
    const Cell mine = Cell::of(access.now, access.site, access.thread);
    for (uint32_t at = offset; at < offset + bytes; ++at) {
      Word& word = words_[at / 4];
      (word.write.tick() == kParted ? parts_[at].write : word.write) = mine;
    }
  }
  // For a new block: drops copies that the previous one did not wait for, and merges bytes into words again.
  void clear() {
    for (Word& word : words_) {
      if (word.write.tick() >= kParted) word = {};
    }
    parts_.clear();
  }
  bool has_parts() const { return !parts_.empty(); }

 private:
  struct Word {
    Cell write, read;
  };
  // The tick of a word whose bytes are recorded separately.
  static constexpr uint32_t kParted = UINT32_MAX - 1;

  // Records from this on may be unordered. Those of units are not ordered by barriers of the block alone.
  static uint64_t first_relevant(const SharedAccess& access) {
    return uint64_t{access.clock != nullptr ? access.began : access.block_epoch} << 32;
  }
  static bool ordered(Cell cell, const SharedAccess& access) {
    if (cell.tick() == kInFlight) return false;
    if (cell.tick() < access.began) return true;
    if (cell.tick() < access.block_epoch && !Units::is_unit(cell.actor())) return true;
    if (cell.actor() == access.thread || (cell.tick() < access.warp_epoch && in_warp(cell, access)))
      return true;
    return access.clock != nullptr && known(cell, *access.clock);
  }
  static bool known(Cell cell, const Clock& clock) {
    if (cell.actor() < kWarp) return cell.tick() < clock.known(cell.actor());
    if (cell.actor() >= kReaders) return false;
    for (int lane = 0; lane < kLanes; ++lane) {
      const auto thread = static_cast<uint16_t>((cell.actor() - kWarp) * kLanes + lane);
      if (cell.tick() >= clock.known(thread)) return false;
    }
    return true;
  }
  static Why unit_conflict(Cell write, const SharedAccess& access) {
    if (write.tick() < access.block_start) return Why::kUnwritten;
    if (write.tick() < access.began) return Why::kNone;
    if (write.tick() == kInFlight || write.tick() >= access.clock->known(write.actor())) return Why::kWrote;
    if (Units::is_async(write.actor()) || write.tick() < access.clock->fenced(write.actor()))
      return Why::kNone;
    return Why::kUnfenced;
  }

  Cell& reader(uint32_t offset, uint32_t index) { return readers_[offset / 4 * readers_per_word_ + index]; }
  void note_reader(Cell& any, uint32_t offset, const SharedAccess& access) {
    Cell& mine = access.clock == nullptr ? any : reader(offset, access.thread / kLanes);
    mine = add_reader(mine, access);
  }
  Cell unordered_reader(Cell any, uint64_t epoch, uint32_t offset, const SharedAccess& access) {
    if (access.clock == nullptr) return any.bits >= epoch && !ordered(any, access) ? any : Cell{};
    for (uint32_t i = 0; i < readers_per_word_; ++i) {
      Cell& each = reader(offset, i);
      if (each.bits >= epoch && !ordered(each, access)) return each;
      each = {};
    }
    return {};
  }
  // Whether the write repeats the earlier value.
  static bool is_same(Cell earlier, const SharedAccess& access, uint32_t from, uint32_t bytes) {
    return access.value != nullptr && earlier.tick() != kInFlight &&
           std::memcmp(access.value + from, access.there + from, bytes) == 0;
  }
  static uint16_t warp_of(const SharedAccess& access) {
    return kWarp | static_cast<uint16_t>(access.thread / 32);
  }
  static bool in_warp(Cell cell, const SharedAccess& access) {
    return cell.actor() == warp_of(access) ||
           (cell.actor() < kWarp && cell.actor() / 32 == access.thread / 32);
  }
  static Cell add_reader(Cell cell, const SharedAccess& access) {
    uint16_t actor = access.thread;
    if (!ordered(cell, access)) actor = in_warp(cell, access) ? warp_of(access) : kReaders;
    return Cell::of(access.now, access.site, actor);
  }

  void take_apart(uint32_t offset) {
    Word& word = words_[offset / 4];
    if (word.write.tick() == kParted) return;
    if (parts_.empty()) parts_.resize(4 * words_.size());
    for (uint32_t i = 0; i < 4; ++i) parts_[offset / 4 * 4 + i] = word;
    word.write = Cell::of(kParted, 0, 0);
  }
  Conflict read_local_rows(uint32_t offset, uint32_t bytes, const SharedAccess& access) {
    take_apart(offset);
    for (uint32_t at = offset; at < offset + bytes; ++at) {
      Word& part = parts_[at];
      if (part.write.tick() < access.block_start) return {Why::kUnwritten, at, part.write};
      if (!ordered(part.write, access)) return {Why::kWrote, at, part.write};
      note_reader(part.read, at, access);
    }
    return {};
  }
  // `from`: where in access.value these bytes begin.
  Conflict write_part(uint32_t offset, uint32_t bytes, const SharedAccess& access, Cell mine,
                      uint32_t from = 0) {
    take_apart(offset);
    for (uint32_t at = offset; at < offset + bytes; ++at) {
      Word& part = parts_[at];
      if (!ordered(part.write, access) && !is_same(part.write, access, from + at - offset, 1)) {
        return {Why::kWrote, at, part.write};
      }
      const Cell other = unordered_reader(part.read, first_relevant(access), at, access);
      if (other.bits != 0) return {Why::kRead, at, other};
      part.write = mine;
    }
    return {};
  }

  std::vector<Word> words_;
  std::vector<Word> parts_;  // per byte; empty while no word is split
  // With clocks: the last reads of each word, by warp and by warpgroup's unit.
  std::vector<Cell> readers_;
  uint32_t readers_per_word_ = 0;
};

}  // namespace ptx
