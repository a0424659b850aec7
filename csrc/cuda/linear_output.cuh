// How products leave a kernel: bias, rounding, and sums that blocks share.
#pragma once

#include "../common/dtype.h"
#include "device.cuh"

namespace peft_kernels::cuda {

DEVICE float load_as_float(const void* p, DType dtype, int64_t i) {
  if (dtype == DType::kF32) return load_constant(static_cast<const float*>(p) + i);
  if (dtype == DType::kBF16) return to_float(load_constant(static_cast<const bf16*>(p) + i));
  return to_float(load_constant(static_cast<const fp16*>(p) + i));
}

// Sums of a tile that blocks share: each leaves its part in memory, and the last one that comes adds them up
// in their order, so that the result does not depend on who that was.

// Whether this block is the last one of so many. For all threads, after they wrote their parts. The tile's
// counter is zero before and after; `last` is a word of shared memory.
DEVICE bool is_last_of_tile(uint32_t* counter, int blocks, uint32_t* last) {
  sync_threads();
  if (thread_index() == 0) {
    const uint32_t before = atomic_add_ordered(counter, 1);
    const bool is_last = before + 1 == static_cast<uint32_t>(blocks);
    if (is_last) store(counter, 0u);
    store(last, uint32_t{is_last});
  }
  sync_threads();
  return load(last) != 0;
}

// Every tile in as many parts.
struct SplitParams {
  int splits;
  uint32_t* counter;  // [tiles]
  float* partial;     // [tiles, splits, elements of a tile]
};

// Equal shares of all tiles' units of work, tile after tile: a tile may begin in one block and end in
// another.
struct ShareParams {
  int units, share;   // of all tiles, of a block
  uint32_t* counter;  // [tiles]
  float* partial;     // [blocks, 2, elements of a tile]

  DEVICE int begin() const { return block_index() * share; }
  DEVICE int end() const { return units - begin() < share ? units : begin() + share; }
};

// The blocks that have units of a tile.
struct Sharers {
  const ShareParams& p;
  int tile, first, last;

  DEVICE Sharers(const ShareParams& params, int of_tile, int tile_units)
      : p(params),
        tile(of_tile),
        first(tile * tile_units / p.share),
        last(((tile + 1) * tile_units - 1) / p.share) {}

  DEVICE bool is_first() const { return block_index() == first; }
  DEVICE bool is_one() const { return first == last; }
  // A block has two tiles at most that are not its own alone: one that others began, and one that it begins.
  DEVICE float* partial_of(int block, int64_t tile_elements) const {
    return p.partial + (2 * block + (block == first)) * tile_elements;
  }
  DEVICE bool last_has_come(uint32_t* shared_word) const {
    return is_last_of_tile(p.counter + tile, last - first + 1, shared_word);
  }
};

}  // namespace peft_kernels::cuda
