// The magnitudes of DoRA: scaling by column, and the norms of the rows of W + s B A.
#pragma once

#include "../nf4/nf4.h"

namespace peft_kernels::cuda {

// ---- dora_scale.cu ------------------------------------------------------------------------------------

struct DoraScale {
  const void* z;  // [m, n], like y, dy and dz
  DType dtype;    // of all of them
  const float* scale;
  const float* bias;  // or null: 0
  int64_t m, n;
};
// y = z + (scale - 1) * (z - bias): scales all but the bias; a scale of 1 changes no bit.
void dora_scale(const DoraScale& params, void* y, Stream stream);
// dz = dy * scale; d_scale = the sum over rows of dy * (z - bias).
void dora_scale_backward(const DoraScale& params, const void* dy, void* dz, float* d_scale, Context& context);

// ---- dora_norm.cu -------------------------------------------------------------------------------------

struct RowSums {
  Nf4View weight;  // [n, k]
  int64_t n, k;
  const float* a;  // [ranks, k]
  int64_t ranks;
};
// Whether the kernel supports it.
bool has_row_sums(const RowSums& params);
// Into how many splits the sums are divided.
int row_sums_splits(const RowSums& params, const Card& card);
// For each row w of the weight: w . w, then w . a for each row a. out [splits, n, 1 + ranks].
void row_sums(const RowSums& params, int splits, float* out, Stream stream);

// norm[i]^2 = squares[i] + scaling (2 products[i] + scaling b[i] gram) . b[i], clamped to 0. Squares and
// products are summed over splits.
struct DoraNorm {
  const float* squares;   // [n]
  int64_t squares_ld;     // stride
  const float* products;  // [n, ranks]: W A^T
  int64_t products_ld;
  int splits;
  int64_t split_stride;
  const float* b;     // [n, ranks]
  const float* gram;  // [ranks, ranks]: A A^T
  float scaling;
  int64_t n, ranks;
  float* norm;  // [n]
};
void dora_norm(const DoraNorm& params, Stream stream);

}  // namespace peft_kernels::cuda
