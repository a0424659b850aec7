// The GEMMs of LoRA adapters on 16-bit activations (lora_*.cu).
//
// Activations are bf16 or fp16; h = mask(x) A^T and dh = scaling dY B are fp32 [m, ranks], with the columns
// of all adapters side by side and 0 in rows that an adapter does not serve. fp32 values are rounded to a
// narrower type only as results: y, dx, or the deltas that torch's GEMM adds to.
#pragma once

#include <vector>

#include "dropout.h"

namespace peft_kernels::cuda {

struct AdapterView {
  const void* a;           // [rank, k]
  const void* b;           // [n of its layer, rank]
  DType a_dtype, b_dtype;  // fp32, or the activations' own
  int rank;
  int layer;
  int64_t h_begin;  // first column in h and dh
  float scaling;
  int64_t group;  // serves rows with this row_group; ignored without row_group
  DropoutMask mask;
};

// Adapters that share x [m, k].
struct LoraBatch {
  DType dtype;  // of the activations
  int64_t m, k;
  const int64_t* row_group;  // [m] or null
  int64_t ranks;
  std::vector<AdapterView> adapters;
};

// x, or the gradient of a layer's output: [m, features].
struct Activations {
  const void* rows;
  int64_t features;
};

void lora_h(const LoraBatch& batch, const void* x, float* h, Context& context);
// dy: one per layer.
void lora_dh(const LoraBatch& batch, const std::vector<Activations>& dy, float* dh, Context& context);

// The gradients of A and B, one per adapter, in the types of A and B; null: not needed. Of dh and h an
// adapter reads the rows that it serves alone, so adapters of different groups may share columns.
void lora_da(const LoraBatch& batch, const void* x, const float* dh, const std::vector<void*>& da,
             Context& context);
void lora_db(const LoraBatch& batch, const std::vector<Activations>& dy, const float* h,
             const std::vector<void*>& db, Context& context);

// The deltas of a layer's adapters as a slab for its GEMM (see linear.h). Forward: scaling h B^T, u [m,
// depth], v [n, depth]. Backward, if no adapter has dropout: dh A, u [m, depth], v [depth, k]. v_rows is n or
// k.
int64_t lora_slab_depth(const LoraBatch& batch, int layer, bool is_dx);
void lora_slab(const LoraBatch& batch, int layer, bool is_dx, int64_t v_rows, const float* ranks, void* u,
               void* v, Stream stream);

// For deltas that do not join a GEMM: y [m, n] += the deltas of the layer's adapters; dx [m, k] = the sum of
// terms + mask(dh A) of all adapters, rounded once. dx may be one of the terms.
void lora_y(const LoraBatch& batch, int layer, int64_t n, const float* h, void* y, Stream stream);
// y [m, n] = the deltas of the layer's adapters alone, rounded once.
void lora_deltas(const LoraBatch& batch, int layer, int64_t n, const float* h, void* y, Stream stream);
// y [m, n] = term + scaling (h B^T + bias) of the only adapter, rounded once; the bias may be null.
void lora_y(const LoraBatch& batch, int64_t n, const float* h, const void* term, const float* bias, void* y,
            Stream stream);
void lora_dx(const LoraBatch& batch, const std::vector<const void*>& terms, const float* dh, void* dx,
             Stream stream);

}  // namespace peft_kernels::cuda
