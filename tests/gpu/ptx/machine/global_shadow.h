// Race detector of global memory: records the last write and read of each word in this launch, to find
// accesses of different threads that nothing orders: neither a barrier of their block nor, between blocks, a
// release and an acquire by atomics and fences (whichever counter they were on).
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "warp.h"

namespace ptx {

enum class Access : uint8_t { kRead, kReadConstant, kWrite, kAtomic, kAtomicRead };

class GlobalShadow {
 public:
  struct Record {
    uint32_t tick = 0;
    int32_t block = 0;
    uint16_t thread = 0, site = 0;
    uint8_t bytes = 0;  // of the word: a mask
    bool constant = false, atomic = false;
  };
  struct Conflict {
    const Record* record = nullptr;  // null: none
    bool with_read = false;
  };

  void start_launch(uint32_t tick, int64_t blocks) {
    start_ = tick;
    releases_.clear();
    releases_.resize(static_cast<size_t>(blocks));
    // Records of earlier launches are ignored anyway; this only limits memory.
    constexpr size_t kMaxPages = 1024;
    if (pages_.size() > kMaxPages) {
      pages_.clear();
      recent_ = {};
    }
  }

  // Records an access, or returns the earlier one that it is not ordered after.
  Conflict note(uint64_t address, int bytes, const Warp& warp, int lane, uint32_t tick, uint16_t site,
                Access access) {
    Page& page = page_of(address);
    Record mine;
    mine.tick = tick;
    mine.block = static_cast<int32_t>(warp.block->index);
    mine.thread = static_cast<uint16_t>(thread_of(warp, lane));
    mine.site = site;
    mine.bytes = static_cast<uint8_t>(bytes < 4 ? ((1 << bytes) - 1) << address % 4 : 0xf);
    mine.constant = access == Access::kReadConstant;
    mine.atomic = access == Access::kAtomic || access == Access::kAtomicRead;
    const bool writes = access == Access::kWrite || access == Access::kAtomic;
    Word* word = &page[address / 4 % kPageWords];
    for (const Word* const end = word + std::max(bytes / 4, 1); word != end; ++word) {
      if (touches(word->write, mine) && !(mine.atomic && word->write.atomic) &&
          (mine.constant || !ordered(word->write, mine, warp, lane))) {
        return {&word->write};
      }
      if (writes) {
        if (touches(word->read, mine) && (word->read.constant || (!(mine.atomic && word->read.atomic) &&
                                                                  !ordered(word->read, mine, warp, lane)))) {
          return {&word->read, true};
        }
        word->write = mine;
      } else {
        // Keeps that it was read as constant.
        const bool constant = mine.constant || (touches(word->read, mine) && word->read.constant);
        word->read = mine;
        word->read.constant = constant;
      }
    }
    return {};
  }

  // The thread releases what it knew at `known`; its block's last barrier was at `epoch`.
  // `clock`: what else it knew, null without AsyncBlock.
  void release(const Warp& warp, int lane, uint32_t tick, uint32_t known, uint32_t epoch,
               const Clock* clock) {
    releases_[static_cast<size_t>(warp.block->index)].push_back(
        {tick, known, epoch, thread_of(warp, lane),
         clock != nullptr ? std::make_unique<Clock>(*clock) : nullptr});
  }

 private:
  static constexpr size_t kPageWords = 1024;
  struct Word {
    Record write, read;
  };
  using Page = std::array<Word, kPageWords>;
  struct Release {
    uint32_t tick, known, block_epoch;
    int thread;
    std::unique_ptr<Clock> clock;
  };
  struct Recent {
    uint64_t number = 0;
    Page* page = nullptr;
  };

  bool touches(const Record& earlier, const Record& mine) const {
    return earlier.tick >= start_ && (earlier.bytes & mine.bytes) != 0;
  }

  Page& page_of(uint64_t address) {
    const uint64_t number = address / 4 / kPageWords;
    Recent& recent = recent_[number % recent_.size()];
    if (recent.number != number || recent.page == nullptr) {
      std::unique_ptr<Page>& page = pages_[number];
      if (page == nullptr) page = std::make_unique<Page>();
      recent = {number, page.get()};
    }
    return *recent.page;
  }

  static bool seen(const Record& access, int thread, uint32_t block_epoch) {
    return access.thread == thread || access.tick < block_epoch;
  }
  bool ordered(const Record& access, const Record& mine, const Warp& warp, int lane) const {
    if (access.block == mine.block) {
      return seen(access, mine.thread, warp.block->epoch) ||
             (access.thread / kLanes == warp.index && access.tick < warp.epoch) ||
             (warp.block->async != nullptr && access.tick < clock_of(warp, lane).known(access.thread));
    }
    uint32_t acquired = std::max(warp.order[static_cast<size_t>(lane)].acquired, warp.block->acquired);
    if (warp.block->async != nullptr) acquired = std::max(acquired, clock_of(warp, lane).acquired);
    for (const Release& release : releases_[static_cast<size_t>(access.block)]) {
      const bool knew = seen(access, release.thread, release.block_epoch) ||
                        (release.clock != nullptr && access.tick < release.clock->known(access.thread));
      if (access.tick < release.known && release.tick < acquired && knew) return true;
    }
    return false;
  }

  uint32_t start_ = 0;
  std::unordered_map<uint64_t, std::unique_ptr<Page>> pages_;
  std::array<Recent, 256> recent_;
  std::vector<std::vector<Release>> releases_;  // [block]
};

}  // namespace ptx
