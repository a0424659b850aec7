// What the launch functions of adapters' kernels share.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../common/integers.h"
#include "kernels.h"
#include "launch.cuh"

namespace peft_kernels::cuda {

// Whether rows of `features` 16-bit elements, or of as many floats, can be read by 16 bytes.
inline bool has_vectors(const void* rows, int64_t features) {
  return features % 8 == 0 && are_aligned({rows});
}

// Into how many parts a sum of `length` terms is to be cut, so that `blocks` times that fill the card.
inline int splits_for(int64_t blocks, int64_t length, const Card& card, int blocks_per_sm = 2) {
  if (blocks == 0) return 1;
  return static_cast<int>(std::max<int64_t>(std::min(blocks_per_sm * int64_t{card.sms} / blocks, length), 1));
}

// The tiles of eight ranks that an adapter has.
inline int64_t tiles_of(int rank) { return ceil_div(rank, 8); }

}  // namespace peft_kernels::cuda
