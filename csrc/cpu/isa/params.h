// What crosses the border between *_ops.cpp and the ISA files: raw pointers, int64 sizes, no torch, no std
// containers. Nothing here may define a function: a function compiled under two target pragmas would be
// merged by the linker, and the wrong one could reach a machine that cannot run it.
#pragma once

#include <cstdint>

#include "../../common/activation.h"
#include "../../common/dtype.h"

namespace peft_kernels::cpu {

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

// Which elements of flat activations dropout keeps: element e, if word e % 4 of block e / 4 of Philox4x32-10
// is at least `threshold`. The seed is the key, the block the low half of the counter, the stream its next
// word, `last` the last one.
struct DropoutMask {
  uint64_t seed;
  uint32_t stream;
  uint32_t threshold;  // 0: keeps all
  float scale;         // of what is kept
  int64_t ld;          // elements from one row of the activations to the next
  uint32_t last = 0;
};

// One product added to the output. In a base layer with adapters the later terms are LoRA deltas: they
// accumulate in the same fp32 tile, so the output is rounded once.
struct GemmTerm {
  const void* lhs;  // [m, depth]
  DType lhs_dtype;
  int64_t lhs_ld;
  MatrixView rhs;  // gemm_nt: [n, depth];  gemm_nn: [depth, n]
  float rhs_scale;
  int64_t depth;
  int64_t m_begin, m_end;  // the rows of the output that it is added to
  DropoutMask mask;        // gemm_nn: applied to the product before it is added
};

// Who computes a gemm_nt: rows as they lie (linear_nt.inl), a packed weight as it comes (linear_gemv.inl), or
// gemm_packed with lhs packed as pairs of bf16 or as fp32.
enum class NtPlan : uint8_t { kDots, kGemv, kPairs, kFloats };

// out[m, n] = start + sum over terms of lhs . rhs, where start is the bias, or what `out` holds, or 0. Where
// there is a residual, the sum is added to it, and a sum of 0, of either sign, changes no bit of it.
struct GemmParams {
  const GemmTerm* terms;
  int64_t term_count;
  const void* bias;  // [n] or null
  DType bias_dtype;
  bool add_to_out;
  void* out;  // [m, n]
  DType out_dtype;
  int64_t out_ld;
  int64_t m;
  int64_t n;
  // gemm_packed: rows [packed_begin, packed_end) of the first term's lhs, as pack_strips leaves them.
  NtPlan plan;
  const void* packed_lhs;
  int64_t packed_begin, packed_end;
  const void* residual;  // gemm_nt and gemm_nn: as `out` is in memory, or null
};

// Rows [rows, depth] strip by strip of kPackRows rows, in a strip by the vectors of a register tile, in these
// step by step of the depth, for each step the rows side by side (at the end a multiple of the vectors'
// lanes), in the order of linear_packed_units.inl.
struct PackParams {
  const void* x;
  DType dtype;
  int64_t rows, depth;
  NtPlan plan;
  void* out;  // rows rounded up to whole vectors, times depth rounded up to kPackDepth
};
inline constexpr int64_t kPackRows = 64;
inline constexpr int64_t kPackDepth = 64;  // a multiple of every unit's order

// Up to so many rows take a packed weight as it comes (linear_gemv.inl), and want nothing packed.
inline constexpr int64_t kFewRows = 8;
// Terms of at most this depth are thin, as LoRA deltas are: summing lanes would cost more than their
// products.
inline constexpr int64_t kThinDepth = 64;
// Up to so many rows of fp32 take a dense weight of fp32 so (linear_gemv_dense.inl).
inline constexpr int64_t kFewFloatRows = 16;

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

// out[i] = x[i] * mask.scale where the mask keeps i, else 0.
struct DropoutParams {
  const void* x;
  DType dtype;  // of both
  DropoutMask mask;
  void* out;
};

// Forward: out = activation(gate) * up. Backward: its gradients in d_gate and d_up. All of one dtype.
struct GatedParams {
  const void* gate;
  const void* up;
  const void* dy;  // backward
  DType dtype;
  Activation activation;
  void* out;     // forward
  void* d_gate;  // backward
  void* d_up;
};

// Layer norm of rows, and its gradients.
struct NormParams {
  const void* x;  // [m, features]
  DType dtype;    // of x, dy and dx
  int64_t features;
  const float* weight;
  const float* bias;  // or null
  float eps;
  float* out;
  const float* d;  // backward: of the output
  const void* dy;  // what dx starts from, or null
  void* dx;        // or null
  float* sums;     // [2, features]: the gradients of weight and bias, of these rows
};

// The bottleneck of an adapter, z before and `value` behind activation, dropout and scaling, in fp32 or
// rounded, or not at all. Elements [begin, end) of z and d, the first of which go to the beginning of the
// others.
struct BottleneckParams {
  const float* z;
  Activation activation;
  DropoutMask mask;
  float scaling;
  float* value;
  BF16* rounded_value;
  float* d;  // or null; backward: of the value, becomes that of z
  BF16* rounded_d;
};

// out[c, r] = copy[r, c] = scale * x[r, c].
inline constexpr int64_t kTransposeRows = 16;  // a multiple of every level's lanes
struct TransposeParams {
  const void* x;
  DType dtype;
  int64_t rows, cols, ld;  // of x
  void* out;               // or null
  DType out_dtype;         // of `copy` too
  int64_t out_ld;
  float scale = 1.0f;
  void* copy = nullptr;  // [rows, cols], contiguous, or null
};

// out[c] = scale * (x[0, c] + x[1, c] + ...).
struct ColumnSumsParams {
  const void* x;
  DType dtype;
  int64_t rows, cols;  // of x, which is contiguous
  float scale;
  float* out;
};

// y[m, n] = z[m, n] + (scale[n] - 1) * (z[m, n] - bias[n]): all but the bias is scaled, and by 1 to the bit.
struct ScaleParams {
  const void* z;
  DType dtype;  // of z, y, dy and dz
  const float* scale;
  const float* bias;  // or null
  void* y;
  int64_t m, n;
  const void* dy;  // backward: dz = dy * scale, d_scale = the sum over rows of dy * (z - bias)
  void* dz;
  float* d_scale;
};

// Of one row of logits, what has been seen of them: the greatest, without the label's, what e^(z - max) of
// the same sums up to, and times z; the label's; the sum of all.
struct SoftmaxState {
  float max, sum, weighted, label, total;
};

// A piece of the logits of some rows, `cols` from column `first_col` on: they join the states.
inline constexpr int64_t kSoftmaxCols = 1024;  // at most
inline constexpr float kFarBelow = 1e4f;       // what exponentials are next to nothing of
struct SoftmaxParams {
  void* logits;  // [rows, logits_ld]; destroyed
  DType logits_dtype;
  int64_t logits_ld, first_col, cols;
  const float* bias;  // [cols] or null; added to the logits, before
  float scale;        // they are multiplied with this, and become
  float cap;          // cap * tanh(z / cap) where this is not 0
  const int64_t* labels;
  SoftmaxState* states;
  bool need_weighted, need_total;
  // Backward: e^(z - max) times the cap's derivative, and 0 for the label; or null. May be the logits, which
  // are read before.
  void* out;
  DType out_dtype;
  int64_t out_ld;
  float* sums;  // [rows, features] of earlier pieces, by other maxima; or null
  int64_t features;
};

// Of one row: its slope, from sums over parts of the vocabulary.
inline constexpr int64_t kSlopeRun = 512;
struct SlopeParams {
  const float* sums;  // [parts, part_ld], the first `features`
  const float* factors;
  int64_t parts, part_ld, features;
  MatrixView weight;
  int64_t label;
  float of_label;
  const float* mean;  // [features] or null
  float of_mean;
  void* out;
  DType dtype;
};

// Backward, the log of each row's sum of exponentials known: what the head has computed for a piece of the
// logits becomes the derivative of dloss times the row's loss by it.
struct SlopesParams {
  float* slopes;  // [rows, cols]
  void* rounded;  // [rows, cols] of dtype, or null
  DType dtype;
  int64_t first_col, cols, vocabulary;
  const float* bias;  // of these columns, or null
  float scale, cap;   // as above
  const int64_t* labels;
  const float* dloss;
  const float* lse;
  float smoothing, z_loss;
};

// Attention of the heads of queries that share one head of keys and values, in one sequence.
struct AttentionParams {
  const void *q, *k, *v;  // rows of `features`, which lie side by side
  DType dtype;            // of all but lse and the sums
  int64_t q_head, q_ld;   // elements from one head, and from one row, to the next
  int64_t k_ld, v_ld;
  int64_t heads, rows, keys, features;
  // [rows, span_count, 2]: of each span of a row's keys the first, and the one behind its last; or null.
  const int32_t* spans;
  int64_t span_count;  // 1 or 2
  bool is_causal;      // and none behind the row's own, the last row's being the last key
  float scale;         // of scores; positive
  void* out;           // backward: what the forward gave
  int64_t out_head, out_ld;
  float* softmax;  // [heads, 2, rows]: the greatest score, and 1 by the sum of exponentials; 0 without a key
  const void* dy;  // backward
  int64_t dy_head, dy_ld;
  void* dq;
  int64_t dq_head, dq_ld;
  float *dk_sums, *dv_sums;  // [keys, features], both rounded up to kAttentionPad; added to
};
inline constexpr int64_t kAttentionPad = 64;

// Root mean square norm of rows, and its gradients.
struct RmsNormParams {
  const void* x;  // [m, features]
  DType dtype;    // of x and dx
  int64_t features;
  const float* weight;
  float eps;
  DType out_dtype;  // of out and dy: as x, or fp32; any where x is fp32
  void* out;
  float* rstd;                // [m]; backward: what the forward gave
  const void* dy;             // backward
  void* dx;                   // or null
  float* sums;                // [features] or null: the gradient of the weight
  bool rounds = true;         // what is normed, to x's type, before it meets the weight
  const void* add = nullptr;  // backward: like dx, which it is added to; or null
  // add_rms_norm: x is sum, which gets residual, of its type, and branch, which is of that or x is fp32.
  const void* branch = nullptr;
  DType branch_dtype = DType::kF32;
  const void* residual = nullptr;
  void* sum = nullptr;
};

// out = x, or x + residual, rounded to out's type; elements one after the other.
struct CastParams {
  const void* x;
  DType dtype;
  const void* residual;  // or null
  DType residual_dtype;
  void* out;
  DType out_dtype;
};

// Heads of [sequences, rows, heads, features], turned by the angles of their rows.
struct RotaryParams {
  const void* x;  // features lie side by side
  DType dtype;
  int64_t x_sequence, x_row, x_head;  // elements from one to the next
  int64_t rows, heads, features;
  const float *cos, *sin;  // [sequences or 1, rows, features]
  int64_t angle_sequence;  // elements from one sequence to the next, or 0
  bool rounds;             // products and their sum, to x's type
  bool inverse;            // turned back
  void* out;               // contiguous
  DType out_dtype;
};

enum class StepKind : uint8_t { kAdamW, kAdam, kLion };

// One parameter in an optimizer's step, flat, and the numbers that ops/adamw.py names.
struct StepTensor {
  void* param;
  const void* grad;  // of param's dtype
  DType dtype;
  void* state1;  // float, or codes where there is an absmax
  void* state2;
  float* absmax1;
  float* absmax2;
  BF16* compensation;  // or null
  int64_t numel;
  float b1, w1, b2, w2, rate, floor, decay, weight_decay, lr;
  uint32_t stream, step;
};

struct StepParams {
  StepKind kind;
  float factor;     // of gradients
  bool stochastic;  // bf16 is rounded to either neighbour
  uint64_t seed;
};

// Scratch that each task gets, 64-byte aligned. Sized to share a 1 MB L2 with what streams through it.
inline constexpr int64_t kScratchBytes = 896 * 1024;

}  // namespace peft_kernels::cpu
