// What kernels take and how they are started: plain pointers, no torch. The ops (*_ops.cpp) fill these
// structs, the families (*.cu) implement the functions. Matrices are row-major; sizes are elements; a pointer
// with a DType beside it has elements of that type.
//
// Every function returns 0 or the launch's error (see stream.h), works on `stream` without waiting for it,
// and allocates nothing. Results are the same from run to run.
#pragma once

#include <cstdint>
#include <initializer_list>

#include "../common/activation.h"
#include "../common/dtype.h"
#include "stream.h"

namespace peft_kernels::cuda {

inline int64_t size_of(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

// Whether all can be read and written by so many bytes; null can.
inline bool are_aligned(std::initializer_list<const void*> pointers, uintptr_t bytes = 16) {
  for (const void* p : pointers) {
    if (reinterpret_cast<uintptr_t>(p) % bytes != 0) return false;
  }
  return true;
}

// An NF4 weight on the device. Either `absmax`, or the double-quantised q8, absmax2 and offset.
struct Nf4View {
  const uint8_t* packed;
  const float* absmax;
  const uint8_t* q8;
  const float* absmax2;
  const float* offset;
  int block_shift;  // log2 of the blocksize
};

// A dense product that joins an NF4 product in the same sums: u[m, depth] v, both of the activations' 16-bit
// type, depth a multiple of 16 (0: none).
struct Slab {
  const void* u;
  const void* v;  // forward [n, depth], used transposed; backward [depth, k]
  int64_t depth;
};

// Dropout as in peft_kernels/ops/dropout.py: keep where Philox(seed, stream, element) >= threshold, kept ones
// times scale.
struct DropoutMask {
  const int64_t* seed;  // on the device, or null: nothing dropped
  uint32_t stream;
  uint32_t threshold;
  float scale;
};

// ---- nf4_quantize.cu, nf4_dequantize.cu
// ------------------------------------------------------------------------

Status quantize_nf4(const void* weight, DType dtype, int64_t numel, int block_shift, uint8_t* packed,
                    float* absmax, Stream stream);
// q8 and absmax2 against an offset that is known.
Status quantize_absmax(const float* absmax, int64_t blocks, const float* offset, uint8_t* q8, float* absmax2,
                       Stream stream);
Status unpack_absmax(const uint8_t* q8, const float* absmax2, const float* offset, int64_t blocks,
                     float* absmax, Stream stream);
// Of a weight with `ld` elements a row.
struct Part {
  int64_t row_begin, row_end;
  int64_t col_begin, col_end;
  int64_t ld;
};
// Into a matrix of the part's size, `out_stride` elements from one row to the next.
Status dequantize_nf4(const Nf4View& weight, const Part& part, void* out, DType dtype, int64_t out_stride,
                      Stream stream);

// ---- dropout.cu ----------------------------------------------------------------------------------------

// out[i] = x[i] * mask.scale where the mask keeps element first + i, else x[i] * 0. `first` is any number: a
// part of larger activations.
Status dropout(const void* x, DType dtype, int64_t numel, int64_t first, const DropoutMask& mask, void* out,
               Stream stream);

// ---- gated.cu ------------------------------------------------------------------------------------------

// out = activation(gate) * up, and its gradients. All of one type and size.
Status gated_activation(Activation activation, const void* gate, const void* up, DType dtype, int64_t count,
                        void* out, Stream stream);
Status gated_activation_backward(Activation activation, const void* dy, const void* gate, const void* up,
                                 DType dtype, int64_t count, void* d_gate, void* d_up, Stream stream);

// ---- linear.cu: products with an NF4 weight --------------------------------------------------------------

// x, y, the packed weight, u and v start at multiples of 16 bytes.
struct LinearParams {
  const void* x;   // [m, k]; dx: dY [m, n]
  DType dtype;     // of x and y: kBF16 or kF16
  Nf4View weight;  // [n, k]
  int64_t m, n, k;
  const void* bias;  // [n] or null
  DType bias_dtype;
  Slab slab;
  void* y;  // [m, n]; dx: [m, k]
};

// The plan (which kernel, what memory) depends on the shape and the card alone.
struct LinearPlan {
  const char* name;         // null: no kernel takes this shape, the caller dequantises
  int64_t counters;         // uint32_t, zero before the first call on a stream; every call leaves them zero
  int64_t workspace_bytes;  // may hold anything
};
struct Card {
  int compute_capability;  // 80, 90, ...
  int sms;
  int64_t shared_bytes;  // of a block, at most
};
// y = x W^T + u v^T + bias.
LinearPlan plan_linear(int64_t m, int64_t n, int64_t k, int block_shift, const Card& card);
Status nf4_linear(const LinearParams& params, const Card& card, uint32_t* counters, void* workspace,
                  Stream stream);
// dx = dY W + u v.
LinearPlan plan_linear_dx(int64_t m, int64_t n, int64_t k, int block_shift, const Card& card);
Status nf4_linear_dx(const LinearParams& params, const Card& card, uint32_t* counters, void* workspace,
                     Stream stream);

// ---- lora_*.cu: the products of adapters ------------------------------------------------------------------
// Activations are bf16 or fp16; h = mask(x) A^T and dh = scaling dY B are fp32 [m, ranks], all adapters'
// columns side by side, 0 in rows that an adapter does not serve. No fp32 number is rounded to less on its
// way. What is called workspace may hold anything.

struct AdapterView {
  const void* a;           // [rank, k]
  const void* b;           // [n of its layer, rank]
  DType a_dtype, b_dtype;  // fp32, or the activations' own
  int rank;
  int layer;
  int64_t h_begin;  // its columns in h and dh
  float scaling;
  int64_t group;  // serves the rows whose row_group is this one; ignored without row_group
  DropoutMask mask;
};

// Adapters that share x.
struct LoraBatch {
  DType dtype;  // of the activations
  int64_t m, k;
  const int64_t* row_group;    // [m] or null
  const AdapterView* adapter;  // on the host
  int adapters;
  int64_t ranks;
};

// The gradient of a layer's output.
struct LayerGradient {
  const void* dy;  // [m, n]
  int64_t n;
};

int64_t lora_h_workspace(const LoraBatch& batch, const Card& card);  // bytes
Status lora_h(const LoraBatch& batch, const void* x, float* h, const Card& card, void* workspace,
              Stream stream);
int64_t lora_dh_workspace(const LoraBatch& batch, const LayerGradient* layer, int layers, const Card& card);
Status lora_dh(const LoraBatch& batch, const LayerGradient* layer, int layers, float* dh, const Card& card,
               void* workspace, Stream stream);

// The gradients of A and B, by adapter, in the types of A and B; null: not wanted.
int64_t lora_da_workspace(const LoraBatch& batch, void* const* da, const Card& card);
Status lora_da(const LoraBatch& batch, const void* x, const float* dh, void* const* da, const Card& card,
               void* workspace, Stream stream);
int64_t lora_db_workspace(const LoraBatch& batch, const LayerGradient* layer, int layers, void* const* db,
                          const Card& card);
Status lora_db(const LoraBatch& batch, const LayerGradient* layer, int layers, const float* h,
               void* const* db, const Card& card, void* workspace, Stream stream);

// The deltas of a layer's adapters, scaling h B^T, as a slab for its product: u [m, depth] and v [n, depth].
int64_t lora_slab_depth(const LoraBatch& batch, int layer);
Status lora_slab(const LoraBatch& batch, int layer, int64_t n, const float* h, void* u, void* v,
                 Stream stream);
// What all adapters add to dx, dh A, if none of them drops: u [m, depth] and v [depth, k].
int64_t lora_dx_slab_depth(const LoraBatch& batch);
Status lora_dx_slab(const LoraBatch& batch, const float* dh, void* u, void* v, Stream stream);

// Where deltas do not join a product: y = the sum of terms + the deltas of the layer's adapters, and dx = the
// sum of terms + mask(dh A) of all adapters, rounded once. The result may be one of the terms, [m, n] or [m,
// k].
Status lora_y(const LoraBatch& batch, int layer, const void* const* term, int terms, int64_t n,
              const float* h, void* y, Stream stream);
Status lora_dx(const LoraBatch& batch, const void* const* term, int terms, const float* dh, void* dx,
               Stream stream);

// ---- dora_scale.cu -------------------------------------------------------------------------------------

struct DoraScale {
  const void* z;  // [m, n], as are y, dy and dz
  DType dtype;    // of all of them
  const float* scale;
  const float* bias;  // or null: 0
  int64_t m, n;
};
// y = z + (scale - 1) * (z - bias): all but the bias is scaled, and by 1 to the bit.
Status dora_scale(const DoraScale& params, void* y, Stream stream);
// dz = dy * scale; d_scale = the sum over rows of dy * (z - bias).
int64_t dora_scale_backward_workspace(const DoraScale& params, const Card& card);  // bytes
Status dora_scale_backward(const DoraScale& params, const void* dy, void* dz, float* d_scale,
                           const Card& card, void* workspace, Stream stream);

// ---- dora_norm.cu --------------------------------------------------------------------------------------

struct RowSums {
  Nf4View weight;  // [n, k]
  int64_t n, k;
  const float* a;  // [ranks, k]
  int64_t ranks;
};
// Whether there is a kernel for it.
bool has_row_sums(const RowSums& params);
// Into how many parts it cuts the sums.
int row_sums_splits(const RowSums& params, const Card& card);
// Of each row w of the weight w . w, and then its products with the rows of a: out [splits, n, 1 + ranks].
Status row_sums(const RowSums& params, int splits, float* out, Stream stream);

// norm[i]^2 = squares[i] + scaling (2 products[i] + scaling b[i] gram) . b[i], at least 0. Squares and
// products are sums over splits.
struct DoraNorm {
  const float* squares;   // [n]
  int64_t squares_ld;     // from one to the next
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
Status dora_norm(const DoraNorm& params, Stream stream);

}  // namespace peft_kernels::cuda
