// Products of a mixture of experts: rows of activations that are sorted by expert, each with its expert's NF4
// weight and adapter. How many rows an expert has is known on the device alone, so a first kernel lists tiles
// of rows there, and all others have as many blocks as rows could make necessary at most, or as the card has
// multiprocessors.
#pragma once

#include "../linear/linear.h"

namespace peft_kernels::cuda {

// Rows [begin, end) of one expert.
struct alignas(16) RowTile {
  int begin, end, expert;
};
struct RowRange {
  int begin, end;
};

// ---- experts_rows.cu -----------------------------------------------------------------------------------

// What the first kernel leaves on the device. Of all rows that have an expert, in order.
struct ExpertRows {
  int experts, rows;  // rows: those of no expert, behind the others, included
  int tile_rows;      // at most, of a tile
  int max_tiles;
  RowTile* tiles;    // [max_tiles], of which there are
  int* count;        // so many
  RowRange* ranges;  // [experts]

  static int64_t most_tiles(int64_t experts, int64_t rows, int64_t tile_rows) {
    return rows / tile_rows + std::min(experts, rows);
  }
  static int64_t bytes(int64_t experts, int64_t max_tiles) {
    return max_tiles * int64_t{sizeof(RowTile)} + experts * int64_t{sizeof(RowRange)} + int64_t{sizeof(int)};
  }
};

// Rows behind the last expert's of a result become zeros.
struct ResultRows {
  void* rows;  // or null
  int64_t row_bytes;
};

// `ends` [experts]: the row behind the last one of each, ascending. Any numbers there are safe.
void list_expert_rows(const ExpertRows& rows, const int* ends, const ResultRows (&results)[2],
                      const Context& context);

// ---- experts_linear.cu, experts_linear_dx.cu -------------------------------------------------------------

// Adapters of experts joining their products, with ranks [rows, rank]: forward scale ranks B^T, B [n, rank]
// of each expert; backward ranks A, A [rank, k]. Factors are fp32, or of the activations' type.
struct ExpertsDelta {
  const float* ranks;
  const void* factor;
  bool is_f32;
  int rank;  // 0: none
  float scale;
};

// LinearParams of one expert's weight, the first, and m of all rows; the others' parts follow it, and so do
// biases [experts, n].
struct ExpertsParams {
  LinearParams linear;
  ExpertRows rows;
  int64_t scale_stride;  // from an expert's 32-bit scales to the next's
  ExpertsDelta delta;
};

// How many rows a tile is to have; 0: there is no kernel.
int experts_tile_rows(DType dtype, int64_t experts, int64_t rows, int64_t n, int64_t k, int block_shift,
                      const Card& card);
int experts_dx_tile_rows(DType dtype, int64_t experts, int64_t rows, int64_t n, int64_t k, int block_shift,
                         const Card& card);
// With rows listed in tiles of that size.
void experts_linear(const ExpertsParams& params, Context& context);
void experts_linear_dx(const ExpertsParams& params, Context& context);

// ---- experts_lora.cu -------------------------------------------------------------------------------------
// The adapters' other products, for features that are multiples of 8 and rows that are aligned to 16 bytes.

// An adapter for each expert, [experts, rank, features], or transposed: [experts, features, rank].
struct ExpertsFactor {
  const void* data;
  bool is_f32;  // else of the activations' type
  int rank;
};

// out [rows, rank] = scale x factor^T, fp32; what rows of no expert get, nobody has written.
void experts_ranks(const ExpertRows& rows, DType dtype, const void* x, int64_t features,
                   const ExpertsFactor& factor, bool transposed, float scale, float* out, Context& context);
// out, shaped as the factor whose gradient it is: scale times the sums over an expert's rows of ranks^T x.
void experts_gradient(const ExpertRows& rows, DType dtype, const void* x, int64_t features,
                      const float* ranks, int rank, bool transposed, float scale, void* out, bool is_f32,
                      Stream stream);

}  // namespace peft_kernels::cuda
