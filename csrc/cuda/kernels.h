// What kernels take and how they are started: plain pointers, no torch. The ops (*_ops.cpp) fill these
// structs, the families (*.cu) implement the functions. Matrices are row-major; sizes are elements; a pointer
// with a DType beside it has elements of that type.
//
// Every function returns 0 or the launch's error (see stream.h), works on `stream` without waiting for it,
// and allocates nothing. Results are the same from run to run.
#pragma once

#include <cstdint>

#include "../common/dtype.h"
#include "stream.h"

namespace peft_kernels::cuda {

inline int64_t size_of(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

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

// Dropout as in reference/dropout.py: keep where Philox(seed, stream, element) >= threshold, kept ones times
// scale.
struct DropoutMask {
  const int64_t* seed;  // on the device, or null: nothing dropped
  uint32_t stream;
  uint32_t threshold;
  float scale;
};

// ---- quantize.cu, dequantize.cu ------------------------------------------------------------------------

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

// ---- elementwise.cu ------------------------------------------------------------------------------------

// out[i] = x[i] * mask.scale where the mask keeps element first + i, else 0; rounded to out_dtype once.
// `first` is any number: a part of larger activations.
Status dropout(const void* x, DType dtype, int64_t numel, int64_t first, const DropoutMask& mask, void* out,
               DType out_dtype, Stream stream);

// ---- linear.cu: products with an NF4 weight --------------------------------------------------------------

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

// y = x W^T + u v^T + bias. The plan (which kernel, what workspace) depends on the shape and the card alone.
struct LinearPlan {
  const char* name;         // null: no kernel takes this shape, the caller dequantises
  int64_t workspace_bytes;  // zeros before the first call on a stream; every call leaves them zero again
};
struct Card {
  int compute_capability;  // 80, 90, ...
  int sms;
  int64_t shared_bytes;  // of a block, at most
};
LinearPlan plan_linear(int64_t m, int64_t n, int64_t k, int block_shift, const Card& card);
Status nf4_linear(const LinearParams& params, const Card& card, void* workspace, Stream stream);
// dx = dY W + u v.
LinearPlan plan_linear_dx(int64_t m, int64_t n, int64_t k, int block_shift, const Card& card);
Status nf4_linear_dx(const LinearParams& params, const Card& card, void* workspace, Stream stream);

// ---- lora.cu: the skinny products of adapters -------------------------------------------------------------

inline constexpr int kMaxAdapters = 32;

struct AdapterView {
  const void* a;  // [rank, k]
  const void* b;  // [n, rank]
  DType dtype;
  int rank;
  int h_begin;  // its columns in h
  float scaling;
  int group;  // serves the rows whose row_group is this one; ignored without row_group
  DropoutMask mask;
};

// Adapters on one x. h [m, ranks] is fp32, all adapters' columns side by side, 0 where one does not serve.
struct LoraParams {
  const void* x;  // [m, k]
  DType dtype;
  int64_t m, k;
  const int64_t* row_group;  // [m] or null
  int adapters;
  AdapterView adapter[kMaxAdapters];
  int64_t ranks;
};

}  // namespace peft_kernels::cuda
