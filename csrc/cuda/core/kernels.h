// The interface of the kernels: plain pointers, no torch. The ops (*_ops.cpp) fill these structs, the *.cu
// files implement the functions; GEMMs with NF4 weights are declared in linear.h. Matrices are row-major,
// sizes are in elements, and a pointer with a DType beside it points to elements of that type.
//
// Every function throws if a launch fails, works asynchronously on a stream, and uses no memory beyond its
// arguments and its Context. Results are the same from run to run.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <vector>

#include "../../common/activation.h"
#include "../../common/dtype.h"
#include "stream.h"

namespace peft_kernels::cuda {

struct Card {
  int compute_capability;  // 80, 90, ...
  int sms;
  int64_t shared_bytes;    // of a block, maximum
  int64_t reserved_bytes;  // maximum shared memory that the system reserves before a block's own
};
// Queries the runtime. Throws std::runtime_error on failure.
Card card_of(int device);

// The stream and scratch memory of one function call.
class Context {
 public:
  Context(const Card& card, Stream stream) : card(card), stream(stream) {}

  const Card& card;
  const Stream stream;

  // Uninitialised. Called at most once.
  virtual void* workspace(int64_t bytes) = 0;
  // At least `count` zeros, which kernels must leave zero again.
  virtual uint32_t* counters(int64_t count) = 0;

 protected:
  ~Context() = default;
};

// Whether all pointers are aligned to `bytes`; null is.
inline bool are_aligned(std::initializer_list<const void*> pointers, uintptr_t bytes = 16) {
  for (const void* p : pointers) {
    if (reinterpret_cast<uintptr_t>(p) % bytes != 0) return false;
  }
  return true;
}

// Whether rows of `features` 16-bit elements, or floats, can be read in vectors of 16 bytes.
inline bool has_vectors(const void* rows, int64_t features) {
  return features % 8 == 0 && are_aligned({rows});
}

// Into how many parts to split a sum of `length` terms, so that `blocks` times that fills the card.
inline int splits_for(int64_t blocks, int64_t length, const Card& card, int blocks_per_sm = 2) {
  if (blocks == 0) return 1;
  return static_cast<int>(std::max<int64_t>(std::min(blocks_per_sm * int64_t{card.sms} / blocks, length), 1));
}

// An NF4 weight on the device. The scale of a block is map[scale_code[block]] * scale[block >> scale_shift] +
// *scale_offset, with the double-quantisation map of the format; with a plain absmax it is scale[block].
struct Nf4View {
  const uint8_t* packed;
  const uint8_t* scale_code;  // plain absmax: any bytes
  const float* scale;
  const float* scale_offset;  // null: plain absmax, with a map of ones
  int scale_shift;
  int block_shift;  // log2 of the blocksize
};

// Dropout as in peft_kernels/ops/lora/dropout.py: keeps elements where Philox(seed, stream, element) >=
// threshold and multiplies them by scale.
struct DropoutMask {
  const int64_t* seed;  // on the device, or null: nothing dropped
  uint32_t stream;
  uint32_t threshold;
  float scale;
};

// ---- nf4_quantize.cu, nf4_dequantize.cu ---------------------------------------------------------------

void quantize_nf4(const void* weight, DType dtype, int64_t numel, int block_shift, uint8_t* packed,
                  float* absmax, Stream stream);
// q8 and absmax2, for a given offset.
void quantize_absmax(const float* absmax, int64_t blocks, const float* offset, uint8_t* q8, float* absmax2,
                     Stream stream);
void unpack_absmax(const uint8_t* q8, const float* absmax2, const float* offset, int64_t blocks,
                   float* absmax, Stream stream);
// A submatrix of a weight with `ld` elements per row.
struct Part {
  int64_t row_begin, row_end;
  int64_t col_begin, col_end;
  int64_t ld;
};
// `out` has the size of the part and `out_stride` elements from row to row.
void dequantize_nf4(const Nf4View& weight, const Part& part, void* out, DType dtype, int64_t out_stride,
                    Stream stream);

// ---- dropout.cu ---------------------------------------------------------------------------------------

// out[i] = x[i] * mask.scale where the mask keeps element first + i, else x[i] * 0. `first` allows a slice of
// larger activations.
void dropout(const void* x, DType dtype, int64_t numel, int64_t first, const DropoutMask& mask, void* out,
             Stream stream);

// ---- gated.cu -----------------------------------------------------------------------------------------

// out = activation(gate) * up, and its gradients. All of one type and size.
void gated_activation(Activation activation, const void* gate, const void* up, DType dtype, int64_t count,
                      void* out, Stream stream);
void gated_activation_backward(Activation activation, const void* dy, const void* gate, const void* up,
                               DType dtype, int64_t count, void* d_gate, void* d_up, Stream stream);

// ---- lora_*.cu: the GEMMs of LoRA adapters ------------------------------------------------------------
// Activations are bf16 or fp16; h = mask(x) A^T and dh = scaling dY B are fp32 [m, ranks], with the columns
// of all adapters side by side and 0 in rows that an adapter does not serve. fp32 values are never rounded to
// a narrower type in between.

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

// The gradients of A and B, one per adapter, in the types of A and B; null: not needed.
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
// y [m, n] = term + scaling (h B^T + bias) of the only adapter, rounded once; the bias may be null.
void lora_y(const LoraBatch& batch, int64_t n, const float* h, const void* term, const float* bias, void* y,
            Stream stream);
void lora_dx(const LoraBatch& batch, const std::vector<const void*>& terms, const float* dh, void* dx,
             Stream stream);

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
