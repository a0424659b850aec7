// Grouped GEMMs by torch, on dense weights or on those that are dequantised first.
#pragma once

#include "experts_tensors.h"

namespace peft_kernels::cuda {

// Of bytes that NF4 weights are dequantised to at a time: pieces are the same columns of the result for all
// experts, as a piece of the experts would begin at a row that the device alone knows. Each piece reads the
// rows once more, so there are few.
inline constexpr int64_t kPieceBytes = int64_t{512} << 20;
#ifdef PEFT_KERNELS_PTX
void set_experts_piece_bytes(int64_t bytes);
#endif

// x W^T + bias + deltas, or with is_dx dY W + deltas, as kGrouped plans it; zero in rows of no expert.
// `rows` are contiguous and 16-byte aligned.
Tensor grouped_gemm(const Tensor& rows, const ListedRows& listed, const ExpertsWeight& weight, bool is_dx,
                    const OptionalTensor& bias, const ExpertsDelta& delta);

}  // namespace peft_kernels::cuda
