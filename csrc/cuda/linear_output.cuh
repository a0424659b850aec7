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

// Sums that `splits` blocks share, tile by tile: each leaves its part in `partial`, and the last one that
// comes to a tile adds them up in their order, so that the result does not depend on who that was.
struct SplitParams {
  int splits;
  uint32_t* counter;  // [tiles], zero; left zero
  float* partial;     // [tiles, splits, elements of a tile]
};

// Whether this block is the last of its tile. For all threads, after they wrote their parts; `last` is a word
// of shared memory.
DEVICE bool is_last_of_tile(const SplitParams& p, int64_t tile, uint32_t* last) {
  sync_threads();
  if (thread_index() == 0) {
    const uint32_t before = atomic_add_ordered(p.counter + tile, 1);
    const bool is_last = before + 1 == static_cast<uint32_t>(p.splits);
    if (is_last) store(p.counter + tile, 0u);
    store(last, uint32_t{is_last});
  }
  sync_threads();
  return load(last) != 0;
}

}  // namespace peft_kernels::cuda
