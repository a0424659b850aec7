// What kernels take and how they are started: plain pointers, no torch. The ops (*_ops.cpp) fill these
// structs, the families (*.cu) implement the functions; products with NF4 weights are in linear.h. Matrices
// are row-major; sizes are elements; a pointer with a DType beside it has elements of that type.
//
// Every function throws where a launch fails, works on a stream without waiting for it, and has no memory but
// what it is given or asks its Context for. Results are the same from run to run.
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
  int64_t shared_bytes;    // of a block, at most
  int64_t reserved_bytes;  // of shared memory before a block's, the system's, at most
};
// What the runtime tells of a device. Throws std::runtime_error where it does not.
Card card_of(int device);

// Where the kernels of a function run, and memory for them; for one call of one function.
class Context {
 public:
  Context(const Card& card, Stream stream) : card(card), stream(stream) {}

  const Card& card;
  const Stream stream;

  // May hold anything. Asked for once at most.
  virtual void* workspace(int64_t bytes) = 0;
  // Zeros, which kernels leave zero again: so many, or more.
  virtual uint32_t* counters(int64_t count) = 0;

 protected:
  ~Context() = default;
};

// Whether all can be read and written by so many bytes; null can.
inline bool are_aligned(std::initializer_list<const void*> pointers, uintptr_t bytes = 16) {
  for (const void* p : pointers) {
    if (reinterpret_cast<uintptr_t>(p) % bytes != 0) return false;
  }
  return true;
}

// Whether rows of `features` 16-bit elements, or of as many floats, can be read by 16 bytes.
inline bool has_vectors(const void* rows, int64_t features) {
  return features % 8 == 0 && are_aligned({rows});
}

// Into how many parts a sum of `length` terms is to be cut, so that `blocks` times that fill the card.
inline int splits_for(int64_t blocks, int64_t length, const Card& card, int blocks_per_sm = 2) {
  if (blocks == 0) return 1;
  return static_cast<int>(std::max<int64_t>(std::min(blocks_per_sm * int64_t{card.sms} / blocks, length), 1));
}

// An NF4 weight on the device. The scale of a block is map[scale_code[block]] * scale[block >> scale_shift] +
// *scale_offset, with the format's map of double quantisation; of a plain absmax it is that, scale[block].
struct Nf4View {
  const uint8_t* packed;
  const uint8_t* scale_code;  // of a plain absmax: any bytes
  const float* scale;
  const float* scale_offset;  // null: a plain absmax, and the map is all ones
  int scale_shift;
  int block_shift;  // log2 of the blocksize
};

// Dropout as in peft_kernels/ops/lora/dropout.py: keep where Philox(seed, stream, element) >= threshold, kept
// ones times scale.
struct DropoutMask {
  const int64_t* seed;  // on the device, or null: nothing dropped
  uint32_t stream;
  uint32_t threshold;
  float scale;
};

// ---- nf4_quantize.cu, nf4_dequantize.cu ------------------------------------------------------------------

void quantize_nf4(const void* weight, DType dtype, int64_t numel, int block_shift, uint8_t* packed,
                  float* absmax, Stream stream);
// q8 and absmax2 against an offset that is known.
void quantize_absmax(const float* absmax, int64_t blocks, const float* offset, uint8_t* q8, float* absmax2,
                     Stream stream);
void unpack_absmax(const uint8_t* q8, const float* absmax2, const float* offset, int64_t blocks,
                   float* absmax, Stream stream);
// Of a weight with `ld` elements a row.
struct Part {
  int64_t row_begin, row_end;
  int64_t col_begin, col_end;
  int64_t ld;
};
// Into a matrix of the part's size, `out_stride` elements from one row to the next.
void dequantize_nf4(const Nf4View& weight, const Part& part, void* out, DType dtype, int64_t out_stride,
                    Stream stream);

// ---- dropout.cu ----------------------------------------------------------------------------------------

// out[i] = x[i] * mask.scale where the mask keeps element first + i, else x[i] * 0. `first` is any number: a
// part of larger activations.
void dropout(const void* x, DType dtype, int64_t numel, int64_t first, const DropoutMask& mask, void* out,
             Stream stream);

// ---- gated.cu ------------------------------------------------------------------------------------------

// out = activation(gate) * up, and its gradients. All of one type and size.
void gated_activation(Activation activation, const void* gate, const void* up, DType dtype, int64_t count,
                      void* out, Stream stream);
void gated_activation_backward(Activation activation, const void* dy, const void* gate, const void* up,
                               DType dtype, int64_t count, void* d_gate, void* d_up, Stream stream);

// ---- lora_*.cu: the products of adapters ------------------------------------------------------------------
// Activations are bf16 or fp16; h = mask(x) A^T and dh = scaling dY B are fp32 [m, ranks], all adapters'
// columns side by side, 0 in rows that an adapter does not serve. No fp32 number is rounded to less on its
// way.

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
// `dy` by layer.
void lora_dh(const LoraBatch& batch, const std::vector<Activations>& dy, float* dh, Context& context);

// The gradients of A and B, by adapter, in the types of A and B; null: not wanted.
void lora_da(const LoraBatch& batch, const void* x, const float* dh, const std::vector<void*>& da,
             Context& context);
void lora_db(const LoraBatch& batch, const std::vector<Activations>& dy, const float* h,
             const std::vector<void*>& db, Context& context);

// The deltas of a layer's adapters as a slab for its product (see linear.h): scaling h B^T, u [m, depth] and
// v [n, depth]; or dh A, if none of them drops, u [m, depth] and v [depth, k]. v_rows is that n or k.
int64_t lora_slab_depth(const LoraBatch& batch, int layer, bool is_dx);
void lora_slab(const LoraBatch& batch, int layer, bool is_dx, int64_t v_rows, const float* ranks, void* u,
               void* v, Stream stream);

// Where deltas do not join a product: y [m, n] += the deltas of the layer's adapters, and dx [m, k] = the sum
// of terms + mask(dh A) of all adapters, rounded once. dx may be one of the terms.
void lora_y(const LoraBatch& batch, int layer, int64_t n, const float* h, void* y, Stream stream);
void lora_dx(const LoraBatch& batch, const std::vector<const void*>& terms, const float* dh, void* dx,
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
void dora_scale(const DoraScale& params, void* y, Stream stream);
// dz = dy * scale; d_scale = the sum over rows of dy * (z - bias).
void dora_scale_backward(const DoraScale& params, const void* dy, void* dz, float* d_scale, Context& context);

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
void row_sums(const RowSums& params, int splits, float* out, Stream stream);

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
void dora_norm(const DoraNorm& params, Stream stream);

}  // namespace peft_kernels::cuda
