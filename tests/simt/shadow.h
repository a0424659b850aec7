// Who wrote and who read each byte of a block's shared memory last, to find accesses that no barrier orders.
//
// Time is a count of the barriers that have completed anywhere. What happened before the tick at which the
// block's last barrier completed is ordered before what its threads do now. Ticks never come back, so that
// nothing is cleared between blocks.
#pragma once

#include <cstdint>
#include <vector>

namespace peft_kernels::simt {

struct Access {
  uint32_t now, block_epoch;  // ticks: this one, the last sync_threads
  uint16_t site, thread;
};

class Shadow {
 public:
  // A recorded access. `who` is a thread, or several that have read: kReaders.
  struct Cell {
    uint64_t bits = 0;  // tick, site, who: compared as one number, the later is the greater

    static Cell of(uint32_t tick, uint16_t site, uint16_t who) {
      return {uint64_t{tick} << 32 | uint64_t{site} << 16 | who};
    }
    uint32_t tick() const { return static_cast<uint32_t>(bits >> 32); }
    uint16_t site() const { return static_cast<uint16_t>(bits >> 16); }
    uint16_t who() const { return static_cast<uint16_t>(bits); }
  };
  static constexpr uint16_t kReaders = 0x8000;
  // The tick of bytes that an asynchronous copy is about to write.
  static constexpr uint32_t kUnderWay = UINT32_MAX;

  struct Conflict {
    int byte = -1;  // none
    bool with_read = false;
    Cell cell;
  };

  explicit Shadow(int bytes) : writes_(bytes), reads_(bytes) {}

  Conflict read(int offset, int bytes, const Access& access) {
    const Conflict conflict = find(writes_, offset, bytes, access, false);
    if (conflict.byte < 0) {
      for (int i = offset; i < offset + bytes; ++i) reads_[i] = add_reader(reads_[i], access);
    }
    return conflict;
  }

  // `lands_later`: by an asynchronous copy; written() then tells when it has.
  Conflict write(int offset, int bytes, const Access& access, bool lands_later = false) {
    Conflict conflict = find(writes_, offset, bytes, access, false);
    if (conflict.byte < 0) conflict = find(reads_, offset, bytes, access, true);
    if (conflict.byte < 0) set_writer(offset, bytes, access, lands_later ? kUnderWay : access.now);
    return conflict;
  }
  void written(int offset, int bytes, const Access& access) { set_writer(offset, bytes, access, access.now); }
  // For a new block: drops copies that the last one did not wait for.
  void clear_under_way() {
    for (Cell& cell : writes_) {
      if (cell.tick() == kUnderWay) cell = Cell{};
    }
  }

 private:
  static bool ordered(Cell cell, const Access& access) {
    if (cell.tick() < access.block_epoch) return true;
    if (cell.tick() == kUnderWay) return false;
    return cell.who() == access.thread;
  }
  static Conflict find(const std::vector<Cell>& cells, int offset, int bytes, const Access& access,
                       bool reads) {
    const uint64_t epoch = uint64_t{access.block_epoch} << 32;
    uint64_t latest = 0;
    for (int i = offset; i < offset + bytes; ++i) latest = latest > cells[i].bits ? latest : cells[i].bits;
    if (latest >= epoch) {
      for (int i = offset; i < offset + bytes; ++i) {
        if (!ordered(cells[i], access)) return {i, reads, cells[i]};
      }
    }
    return {};
  }
  static Cell add_reader(Cell cell, const Access& access) {
    const bool others = cell.tick() >= access.block_epoch && cell.who() != access.thread;
    return Cell::of(access.now, access.site, others ? kReaders : access.thread);
  }
  void set_writer(int offset, int bytes, const Access& access, uint32_t tick) {
    for (int i = offset; i < offset + bytes; ++i) writes_[i] = Cell::of(tick, access.site, access.thread);
  }

  std::vector<Cell> writes_, reads_;
};

}  // namespace peft_kernels::simt
