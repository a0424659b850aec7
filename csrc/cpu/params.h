// What crosses the border between ops.cpp and the ISA files: raw pointers, int64 sizes, no torch, no std
// containers. Nothing here may define a function: a function compiled under two target pragmas would be
// merged by the linker, and the wrong one could reach a machine that cannot run it.
#pragma once

#include <cstdint>

namespace peft_kernels::cpu {

enum class DType : uint8_t { kF32, kBF16, kF16 };

// Storage only; arithmetic is fp32.
struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

struct Nf4View {
  const uint8_t* packed;  // [(n + 1) / 2]
  const float* absmax;    // [blocks], or null when the absmax is itself quantised
  const uint8_t* q8;      // [blocks]
  const float* absmax2;   // [ceil(blocks / 256)]
  float offset;
  int block_shift;  // log2(blocksize)
};

// A row-major matrix that kernels read panel by panel: dense, or NF4 when `nf4` is set.
struct MatrixView {
  const void* data;
  DType dtype;
  int64_t ld;  // elements from one row to the next
  const Nf4View* nf4;
};

// One product added to the output. In a base layer with an adapter the second term is the LoRA delta: it
// accumulates in the same fp32 tile, so the output is rounded once.
struct GemmTerm {
  const void* lhs;  // [m, depth]
  DType lhs_dtype;
  int64_t lhs_ld;
  MatrixView rhs;  // gemm_nt: [n, depth];  gemm_nn: [depth, n]
  float rhs_scale;
  int64_t depth;
};

inline constexpr int kMaxTerms = 2;

// out[m, n] = start + sum over terms of lhs . rhs, where start is the bias, or what `out` holds, or 0.
struct GemmParams {
  GemmTerm terms[kMaxTerms];
  int term_count;
  const void* bias;  // [n] or null
  DType bias_dtype;
  bool add_to_out;
  void* out;  // [m, n]
  DType out_dtype;
  int64_t out_ld;
  int64_t m;
  int64_t n;
};

// The part of the output that one task computes.
struct Rect {
  int64_t m0, m1;
  int64_t n0, n1;
};

struct QuantizeParams {
  const void* weight;  // [n]
  DType dtype;
  int64_t n;
  int block_shift;
  uint8_t* packed;  // [(n + 1) / 2]
  float* absmax;    // [blocks]
};

// Scratch that each task gets, 64-byte aligned. Sized to share a 1 MB L2 with what streams through it.
inline constexpr int64_t kScratchBytes = 896 * 1024;

}  // namespace peft_kernels::cpu
