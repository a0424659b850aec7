// Which kernel normalises rows of a length.
#pragma once

#include "../core/launch.cuh"
#include "norm_rows.cuh"

namespace peft_kernels::cuda {

// Threads of a row and elements of each in registers, or neither: a loop, over vectors or single elements.
template <int kRowThreads_, int kElements_>
struct RowLayout {
  static constexpr int kRowThreads = kRowThreads_, kElements = kElements_;
};
struct LoopOverVectors {};
struct LoopOverElements {};

// Calls body with a value of the layout for rows of T.
template <class T, class Body>
void with_row_layout(int64_t features, const Body& body) {
  if (features % (16 / int64_t{sizeof(T)}) != 0) return body(LoopOverElements{});
  if (features <= 128) return body(RowLayout<16, 8>{});
  if (features <= 256) return body(RowLayout<32, 8>{});
  if (features <= 1024) return body(RowLayout<128, 8>{});
  if (features <= 4096) return body(RowLayout<256, 16>{});
  if (features <= 8192) return body(RowLayout<512, 16>{});
  body(LoopOverVectors{});
}

// As many blocks as are resident at once, fewer if there are few rows.
template <class Kernel>
int64_t row_blocks(int64_t m, const Card& card) {
  return std::min(ceil_div(m, Kernel::kRowsOfBlock), int64_t{Kernel::kBlocksPerSm} * card.sms);
}

}  // namespace peft_kernels::cuda
