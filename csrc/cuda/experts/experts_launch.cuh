// Shared by the launches of grouped GEMMs.
#pragma once

#include "../linear/linear_groups.cuh"
#include "experts.h"

namespace peft_kernels::cuda {

// The counters and partial sums for blocks that share tiles; the device computes the shares.
inline ShareParams shares(int64_t max_tiles, int64_t tile_elements, Context& context) {
  const int64_t bytes = context.card.sms * 2 * tile_elements * int64_t{sizeof(float)};
  return {0, 0, context.counters(max_tiles), static_cast<float*>(context.workspace(bytes))};
}

inline ManyWeights::Params many_weights(const ExpertsParams& params, const ShareParams& work) {
  const int64_t elements = int64_t{params.linear.n} * params.linear.k;
  // Without double quantisation, codes are any bytes (view_of): those of the packed weight.
  const bool nested = params.linear.weight.scale_offset != nullptr;
  return {params.linear,
          work,
          params.rows,
          elements / 2,
          nested ? elements >> params.linear.weight.block_shift : elements / 2,
          params.scale_stride,
          params.delta};
}

}  // namespace peft_kernels::cuda
