// Grouped GEMMs of a mixture of experts: rows of activations sorted by expert, each with its expert's NF4
// weight and adapter. The number of rows per expert is known on the device alone, so a first kernel lists
// tiles of rows there (row_tiles.h), and the others launch as many blocks as any distribution of rows could
// need, or as there are multiprocessors.
#pragma once

#include "../core/row_tiles.h"
#include "../linear/linear.h"

namespace peft_kernels::cuda {

// ---- experts_linear.cu, experts_linear_dx.cu ----------------------------------------------------------

// `linear` has the first expert's weight and m of all rows; the other experts' parts follow in memory, as do
// biases [experts, n].
struct ExpertsParams {
  LinearParams linear;
  ExpertRows rows;
  int64_t scale_stride;  // from an expert's 32-bit scales to the next's
  ExpertsDelta delta;
};

// The rows per tile; 0: no kernel supports it.
int experts_tile_rows(DType dtype, int64_t experts, int64_t rows, int64_t n, int64_t k, int block_shift,
                      const Card& card);
int experts_dx_tile_rows(DType dtype, int64_t experts, int64_t rows, int64_t n, int64_t k, int block_shift,
                         const Card& card);
// `params.rows` must have tiles of that size.
void experts_linear(const ExpertsParams& params, Context& context);
void experts_linear_dx(const ExpertsParams& params, Context& context);

// ---- experts_lora.cu ----------------------------------------------------------------------------------
// The adapters' other GEMMs, for features that are multiples of 8 and 16-byte aligned rows.

// A factor per expert, [experts, rank, features], or transposed: [experts, features, rank].
struct ExpertsFactor {
  const void* data;
  bool is_f32;  // else of the activations' type
  int rank;
};

// out [rows, rank] = scale x factor^T, fp32; rows of no expert are not written.
void experts_ranks(const ExpertRows& rows, DType dtype, const void* x, int64_t features,
                   const ExpertsFactor& factor, bool transposed, float scale, float* out, Context& context);
// The gradient of a factor, in its shape: scale times the sums over an expert's rows of ranks^T x.
void experts_gradient(const ExpertRows& rows, DType dtype, const void* x, int64_t features,
                      const float* ranks, int rank, bool transposed, float scale, void* out, bool is_f32,
                      Stream stream);

}  // namespace peft_kernels::cuda
