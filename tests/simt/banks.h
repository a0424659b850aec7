// Wavefronts of shared memory: how often a warp-wide access must be repeated because lanes need different
// words of one bank. Lanes run one after the other here, so each logs what it accesses, and when the warp has
// met at a barrier or a collective, the n-th accesses of a line are put together.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <vector>

#include "emulator.h"

namespace peft_kernels::simt {

class BankLog {
 public:
  void add(int lane, int offset, int bytes, uint16_t site) {
    lanes_[lane].push_back({static_cast<uint32_t>(offset), site, static_cast<uint16_t>(bytes)});
  }

  // Adds what was logged to counts[site], and forgets it.
  void count(std::vector<BankCount>& counts) {
    size_t longest = 0;
    for (const auto& log : lanes_) longest = std::max(longest, log.size());
    if (longest == 0) return;
    if (in_step()) {
      for (size_t i = 0; i < longest; ++i) {
        Entry access[kLanes];
        for (int lane = 0; lane < kLanes; ++lane) access[lane] = lanes_[lane][i];
        add_wavefronts(access, ~0u, counts);
      }
    } else {
      count_divergent(counts);
    }
    for (auto& log : lanes_) log.clear();
  }
  void clear() {
    for (auto& log : lanes_) log.clear();
  }

 private:
  struct Entry {
    uint32_t offset;
    uint16_t site, bytes;
  };

  bool in_step() const {
    for (const auto& log : lanes_) {
      if (log.size() != lanes_[0].size()) return false;
      for (size_t i = 0; i < log.size(); ++i) {
        if (log[i].site != lanes_[0][i].site || log[i].bytes != lanes_[0][i].bytes) return false;
      }
    }
    return true;
  }

  void count_divergent(std::vector<BankCount>& counts) {
    struct Group {
      uint32_t lanes = 0;
      Entry access[kLanes];
    };
    std::map<uint64_t, Group> groups;  // by site, size and occurrence
    for (int lane = 0; lane < kLanes; ++lane) {
      std::map<uint32_t, uint32_t> occurrences;
      for (const Entry& entry : lanes_[lane]) {
        const uint32_t key = uint32_t{entry.site} << 16 | entry.bytes;
        Group& group = groups[uint64_t{key} << 32 | occurrences[key]++];
        group.lanes |= 1u << lane;
        group.access[lane] = entry;
      }
    }
    for (const auto& [key, group] : groups) add_wavefronts(group.access, group.lanes, counts);
  }

  // Accesses of 8 bytes go by half warps, of 16 bytes by quarters.
  static void add_wavefronts(const Entry (&access)[kLanes], uint32_t lanes, std::vector<BankCount>& counts) {
    const Entry& first = access[__builtin_ctz(lanes)];
    const int words = std::max(first.bytes / 4, 1), group = kLanes / words;
    BankCount& count = counts[first.site];
    ++count.accesses;
    for (int begin = 0; begin < kLanes; begin += group) {
      const int needed = wavefronts(access, lanes, begin, begin + group, words);
      count.wavefronts += needed;
      count.conflicts += std::max(needed - 1, 0);
    }
  }
  static int wavefronts(const Entry (&access)[kLanes], uint32_t lanes, int begin, int end, int words) {
    constexpr int kBanks = 32;
    uint32_t word_of[kBanks][kLanes];  // the different words of a bank
    int used[kBanks] = {}, most = 0;
    for (int lane = begin; lane < end; ++lane) {
      if ((lanes >> lane & 1) == 0) continue;
      for (int i = 0; i < words; ++i) {
        const uint32_t word = access[lane].offset / 4 + i;
        uint32_t* seen = word_of[word % kBanks];
        int& n = used[word % kBanks];
        if (std::find(seen, seen + n, word) == seen + n) seen[n++] = word;
        most = std::max(most, n);
      }
    }
    return most;
  }

  std::vector<Entry> lanes_[kLanes];
};

}  // namespace peft_kernels::simt
