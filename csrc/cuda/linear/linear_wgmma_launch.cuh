// Shared by the launches of LinearWgmma and ExpertsWgmma.
#pragma once

#include "../hopper/tensor_map.h"
#include "linear_wgmma.cuh"

namespace peft_kernels::cuda {

// Describes x and the codes of all experts to TMA.
template <class Groups>
void map_operands(const WgmmaShape& shape, int64_t experts, const LinearParams& linear,
                  WgmmaParams<Groups>& params) {
  // Codes of a stage: 128 rows of 64 columns, or 64 rows of 128.
  const int rows = shape.is_dx ? WgmmaShape::kDepth : WgmmaShape::kFeatures;
  const int bytes = WgmmaShape::kWeightBytes / rows;
  map_matrix(linear.weight.packed, 1, experts * linear.n, linear.k / 2, rows, bytes, params.weight_map);
  const int terms = shape.is_dx ? linear.n : linear.k;
  map_matrix(linear.x, 2, linear.m, terms, shape.tokens, WgmmaShape::kDepth, params.x_map);
}

}  // namespace peft_kernels::cuda
