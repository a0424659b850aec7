// Grouped GEMMs of a mixture of experts: rows of activations sorted by expert, each with its expert's NF4
// weight and adapter. The number of rows per expert is known on the device alone, so a first kernel lists
// tiles of rows there (row_tiles.h), and the others launch as many blocks as any distribution of rows could
// need, or as there are multiprocessors.
#pragma once

#include "../core/row_tiles.h"
#include "../linear/linear.h"

namespace peft_kernels::cuda {

// ---- experts_plan.cpp ---------------------------------------------------------------------------------

// How a grouped GEMM is computed: by a kernel that decodes NF4, by torch's grouped GEMM on dense weights, or
// by ops on one expert after the other, for which the host waits for the numbers of rows.
enum class ExpertsWay { kFused, kGrouped, kComposed };
struct ExpertsPlan {
  ExpertsWay way = ExpertsWay::kComposed;
  int tile_rows = 0;      // of the list of rows
  bool is_wgmma = false;  // kFused: by ExpertsWgmma
};
// Weights [experts, n, k] in NF4, with their packed values aligned to 16 bytes or, for kGrouped alone, 4.
ExpertsPlan plan_experts(bool is_dx, DType dtype, int64_t experts, int64_t rows, int64_t n, int64_t k,
                         int block_shift, bool is_aligned, const Card& card);
// Dense weights: kGrouped, or kComposed where torch has no kernel.
ExpertsPlan plan_dense_experts(DType dtype, int64_t experts, int64_t rows, int64_t n, int64_t k,
                               const Card& card);

// ---- experts_linear.cu, experts_linear_dx.cu, experts_wgmma.cu -----------------------------------------

// `linear` has the first expert's weight and m of all rows; the other experts' parts follow in memory, as do
// biases [experts, n].
struct ExpertsParams {
  LinearParams linear;
  ExpertRows rows;
  int64_t scale_stride;  // from an expert's 32-bit scales to the next's
  ExpertsDelta delta;
};

// Whether the units of work, shares of them, and the rows of all weights fit in ints.
inline bool counts_fit(int64_t units, int64_t experts, int64_t n, int64_t k, const Card& card) {
  constexpr int64_t kMost = int64_t{1} << 30;
  return units + card.sms < kMost && experts > 0 && experts * std::max(n, k) < kMost;
}

// The rows per tile; 0: no kernel supports it.
int experts_tile_rows(DType dtype, int64_t experts, int64_t rows, int64_t n, int64_t k, int block_shift,
                      const Card& card);
int experts_dx_tile_rows(DType dtype, int64_t experts, int64_t rows, int64_t n, int64_t k, int block_shift,
                         const Card& card);
// `params.rows` must have tiles of that size.
void experts_linear(const ExpertsParams& params, Context& context);
void experts_linear_dx(const ExpertsParams& params, Context& context);

// The same for ExpertsWgmma; 0 also where the build or the card lacks LinearWgmma.
int experts_wgmma_tile_rows(bool is_dx, DType dtype, int64_t experts, int64_t rows, int64_t n, int64_t k,
                            int block_shift, const Card& card);
// For those tiles. Throws if the build does not have it.
void experts_wgmma(bool is_dx, const ExpertsParams& params, Context& context);

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

// Columns [begin, begin + count) of a grouped GEMM's result, [rows, features], in bf16: the columns of the
// product with the base, [rows, count], plus the deltas and biases. They are multiples of 8.
struct ExpertsColumns {
  const void* product;
  int64_t begin, count, features;
  ExpertsDelta delta;
  bool is_dx;         // which of the deltas' factors
  const float* bias;  // [experts, features] or null
  void* out;          // may be the product if count is features
};
void experts_expand(const ExpertRows& rows, const ExpertsColumns& columns, Stream stream);

}  // namespace peft_kernels::cuda
