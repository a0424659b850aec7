// Who wrote each word of global memory last in this launch, to find accesses by others that nothing orders:
// neither a barrier of their block nor, between blocks, a release and an acquire by atomic_add_ordered. Which
// counter those were on is not looked at.
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
  struct Write {
    uint32_t tick = 0;
    int32_t block = 0;
    uint16_t thread = 0, site = 0;
    uint8_t bytes = 0;  // of the word: a mask
  };

  void start_launch(uint32_t tick, int64_t blocks) {
    start_ = tick;
    releases_.assign(static_cast<size_t>(blocks), {});
    // Nothing of an earlier launch is of interest, so this is only about memory.
    constexpr size_t kMaxPages = 16384;
    if (pages_.size() > kMaxPages) {
      pages_.clear();
      recent_ = {};
    }
  }

  // The last write of this launch to any of these bytes that is not ordered before what `thread` does now;
  // with `any`, be it ordered or not. Null: none.
  const Write* find(const void* p, int bytes, const Thread& thread, bool any) {
    const auto address = reinterpret_cast<uintptr_t>(p);
    const Page* page = page_of(address, false);
    if (page == nullptr) return nullptr;
    const uint8_t mask = mask_of(address, bytes);
    for (int i = 0; i < words_of(bytes); ++i) {
      const Write& write = (*page)[address / 4 % kPageWords + static_cast<size_t>(i)];
      if (write.tick < start_ || (write.bytes & mask) == 0) continue;
      if (any || !ordered(write, thread)) return &write;
    }
    return nullptr;
  }

  void write(const void* p, int bytes, const Thread& thread, uint32_t tick, uint16_t site) {
    const auto address = reinterpret_cast<uintptr_t>(p);
    Page& page = *page_of(address, true);
    const auto block = static_cast<int32_t>(thread.block->index);
    const auto index = static_cast<uint16_t>(thread.index);
    for (int i = 0; i < words_of(bytes); ++i) {
      Write& write = page[address / 4 % kPageWords + static_cast<size_t>(i)];
      const bool more = write.tick == tick && write.block == block && write.thread == index;
      const uint8_t mask = mask_of(address, bytes);
      write = {tick, block, index, site, static_cast<uint8_t>(more ? write.bytes | mask : mask)};
    }
  }

  void release(const Thread& thread, uint32_t tick) {
    releases_[static_cast<size_t>(thread.block->index)].push_back(
        {tick, thread.block->epoch, thread.warp->epoch, thread.index});
  }

 private:
  static constexpr size_t kPageWords = 1024;
  using Page = std::array<Write, kPageWords>;
  struct Release {
    uint32_t tick, block_epoch, warp_epoch;
    int thread;
  };
  struct Recent {
    uintptr_t number = 0;
    Page* page = nullptr;
  };

  static int words_of(int bytes) { return bytes < 4 ? 1 : bytes / 4; }
  static uint8_t mask_of(uintptr_t address, int bytes) {
    return static_cast<uint8_t>(bytes < 4 ? ((1 << bytes) - 1) << address % 4 : 0xf);
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

  static bool seen(const Write& write, int thread, uint32_t block_epoch, uint32_t warp_epoch) {
    return write.thread == thread || write.tick < block_epoch ||
           (write.thread / kLanes == thread / kLanes && write.tick < warp_epoch);
  }
  bool ordered(const Write& write, const Thread& thread) const {
    if (write.block == thread.block->index) {
      return seen(write, thread.index, thread.block->epoch, thread.warp->epoch);
    }
    const uint32_t acquired = std::max({thread.acquired, thread.warp->acquired, thread.block->acquired});
    for (const Release& release : releases_[static_cast<size_t>(write.block)]) {
      if (write.tick < release.tick && release.tick < acquired &&
          seen(write, release.thread, release.block_epoch, release.warp_epoch)) {
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
