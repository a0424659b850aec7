// Who wrote and who read each word of global memory last in this launch, to find accesses by others that
// nothing orders: neither a barrier of their block nor, between blocks, a release and an acquire by
// atomic_add_ordered. Which counter those were on is not looked at. Reads are kept where something near has
// been written, which goes for workspace.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <unordered_map>
#include <vector>

#include "threads.h"

namespace peft_kernels::simt {

class GlobalShadow {
 public:
  struct Record {
    uint32_t tick = 0;
    int32_t block = 0;
    uint16_t thread = 0, site = 0;
    uint8_t bytes = 0;  // of the word: a mask
  };
  struct Conflict {
    const Record* record = nullptr;  // none
    bool with_read = false;
  };

  void start_launch(uint32_t tick, int64_t blocks) {
    start_ = tick;
    releases_.assign(static_cast<size_t>(blocks), {});
    // Nothing of an earlier launch is of interest, so this is only about memory.
    constexpr size_t kMaxPages = 8192;
    if (pages_.size() > kMaxPages) {
      pages_.clear();
      recent_ = {};
    }
  }

  // Notes a read, or returns the write that it is not ordered after; if `constant`, any write.
  Conflict read(const void* p, int bytes, const Thread& thread, uint32_t tick, uint16_t site, bool constant) {
    const auto address = reinterpret_cast<uintptr_t>(p);
    Page* page = page_of(address, false);
    if (page == nullptr) return {};
    const Record mine = record(address, bytes, thread, tick, site);
    for (Word *word = word_of(*page, address), *end = word + words_of(bytes); word != end; ++word) {
      if (touches(word->write, mine) && (constant || !ordered(word->write, thread))) return {&word->write};
      word->read = mine;
    }
    return {};
  }

  // Notes a write, or returns the access that it is not ordered after.
  Conflict write(const void* p, int bytes, const Thread& thread, uint32_t tick, uint16_t site) {
    const auto address = reinterpret_cast<uintptr_t>(p);
    Page& page = *page_of(address, true);
    const Record mine = record(address, bytes, thread, tick, site);
    for (Word *word = word_of(page, address), *end = word + words_of(bytes); word != end; ++word) {
      if (touches(word->write, mine) && !ordered(word->write, thread)) return {&word->write};
      if (touches(word->read, mine) && !ordered(word->read, thread)) return {&word->read, true};
      word->write = mine;
    }
    return {};
  }

  void release(const Thread& thread, uint32_t tick) {
    releases_[static_cast<size_t>(thread.block->index)].push_back({tick, thread.block->epoch, thread.index});
  }

 private:
  static constexpr size_t kPageWords = 1024;
  struct Word {
    Record write, read;
  };
  using Page = std::array<Word, kPageWords>;
  struct Release {
    uint32_t tick, block_epoch;
    int thread;
  };
  struct Recent {
    uintptr_t number = 0;
    Page* page = nullptr;
  };

  static int words_of(int bytes) { return bytes < 4 ? 1 : bytes / 4; }
  static Word* word_of(Page& page, uintptr_t address) { return &page[address / 4 % kPageWords]; }
  static Record record(uintptr_t address, int bytes, const Thread& thread, uint32_t tick, uint16_t site) {
    const int mask = bytes < 4 ? ((1 << bytes) - 1) << address % 4 : 0xf;
    return {tick, static_cast<int32_t>(thread.block->index), static_cast<uint16_t>(thread.index), site,
            static_cast<uint8_t>(mask)};
  }
  bool touches(const Record& earlier, const Record& mine) const {
    return earlier.tick >= start_ && (earlier.bytes & mine.bytes) != 0;
  }

  // Null: nothing was written there, and `create` is false.
  Page* page_of(uintptr_t address, bool create) {
    const uintptr_t number = address / 4 / kPageWords;
    Recent& recent = recent_[number % recent_.size()];
    if (recent.number != number || (recent.page == nullptr && create)) {
      const auto found = pages_.find(number);
      Page* page = found != pages_.end() ? found->second.get() : nullptr;
      if (page == nullptr && create) page = (pages_[number] = std::make_unique<Page>()).get();
      recent = {number, page};
    }
    return recent.page;
  }

  static bool seen(const Record& access, int thread, uint32_t block_epoch) {
    return access.thread == thread || access.tick < block_epoch;
  }
  bool ordered(const Record& access, const Thread& thread) const {
    if (access.block == thread.block->index) {
      return seen(access, thread.index, thread.block->epoch);
    }
    const uint32_t acquired = std::max(thread.acquired, thread.block->acquired);
    for (const Release& release : releases_[static_cast<size_t>(access.block)]) {
      if (access.tick < release.tick && release.tick < acquired &&
          seen(access, release.thread, release.block_epoch)) {
        return true;
      }
    }
    return false;
  }

  uint32_t start_ = 0;
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages_;
  std::array<Recent, 256> recent_;
  std::vector<std::vector<Release>> releases_;  // [block]
};

}  // namespace peft_kernels::simt
