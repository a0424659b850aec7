// Counts wavefronts of shared memory: how often a warp-wide access is repeated because lanes need different
// words of one bank.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "machine.h"
#include "warp.h"

namespace ptx {

class BankCounter {
 public:
  void start_launch(size_t sites) { counts_.resize(std::max(counts_.size(), sites)); }

  void add(const uint32_t (&offsets)[kLanes], uint32_t lanes, int bytes, uint16_t site) {
    // 8-byte accesses are split into half warps, 16-byte ones into quarters.
    const int words = std::max(bytes / 4, 1), group = kLanes / words;
    BankCount& count = counts_[site];
    ++count.accesses;
    for (int begin = 0; begin < kLanes; begin += group) {
      const int needed = wavefronts(offsets, lanes, begin, begin + group, words);
      count.wavefronts += needed;
      count.conflicts += std::max(needed - 1, 0);
    }
  }

  void end_launch(const std::vector<std::string>& sites) {
    for (size_t site = 0; site < sites.size(); ++site) {
      const BankCount& count = counts_[site];
      if (count.accesses == 0) continue;
      BankCount& total = totals[sites[site]];
      total.accesses += count.accesses;
      total.wavefronts += count.wavefronts;
      total.conflicts += count.conflicts;
    }
    std::fill(counts_.begin(), counts_.end(), BankCount{});
  }

  std::map<std::string, BankCount> totals;

 private:
  static constexpr int kBanks = 32;

  static int wavefronts(const uint32_t (&offsets)[kLanes], uint32_t lanes, int begin, int end, int words) {
    uint32_t word_of[kBanks];  // first word seen in the bank
    uint32_t used = 0;
    for (int lane = begin; lane < end; ++lane) {
      if ((lanes >> lane & 1) == 0) continue;
      for (int i = 0; i < words; ++i) {
        const uint32_t word = offsets[lane] / 4 + static_cast<uint32_t>(i), bit = 1u << word % kBanks;
        if ((used & bit) == 0) {
          used |= bit;
          word_of[word % kBanks] = word;
        } else if (word_of[word % kBanks] != word) {
          return with_conflicts(offsets, lanes, begin, end, words);
        }
      }
    }
    return used != 0 ? 1 : 0;
  }
  static int with_conflicts(const uint32_t (&offsets)[kLanes], uint32_t lanes, int begin, int end,
                            int words) {
    uint32_t words_of[kBanks][kLanes];  // the different words of a bank
    int used[kBanks] = {}, most = 0;
    for (int lane = begin; lane < end; ++lane) {
      if ((lanes >> lane & 1) == 0) continue;
      for (int i = 0; i < words; ++i) {
        const uint32_t word = offsets[lane] / 4 + static_cast<uint32_t>(i);
        uint32_t* seen = words_of[word % kBanks];
        int& n = used[word % kBanks];
        if (std::find(seen, seen + n, word) == seen + n) seen[n++] = word;
        most = std::max(most, n);
      }
    }
    return most;
  }

  std::vector<BankCount> counts_;  // by site
};

}  // namespace ptx
