// The arguments of the kernels, shared by *_ops.cpp and the ISA files: raw pointers and int64 sizes, no
// torch, no std containers. Nothing here may define a function: the linker would merge copies compiled under
// different target pragmas, and could keep one that the machine cannot run.
#pragma once

#include <cstdint>

#include "../../common/activation.h"
#include "../../common/codes.h"
#include "../../common/dtype.h"

namespace peft_kernels::cpu {

// Storage types; arithmetic is fp32.
struct BF16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

// A packed weight. The scale of a block is absmax[block]; where that is null half_scales[block]; where that
// is null too scale_values[q8[block]], with double quantisation times absmax2[block / 256] plus the offset.
// Codes are of four bits, or bytes where `codes` is null: then the scale of an element is absmax[(row >>
// row_shift) * blocks_in_row + (col >> block_shift)].
struct Nf4View {
  const CodeValues* codes;      // with zero points: of zero point 0, followed by the others
  const uint8_t* packed;        // [(n + 1) / 2], or [n] bytes
  const float* absmax;          // [blocks], or null
  const uint16_t* half_scales;  // [blocks], or null
  const uint8_t* zero_points;   // [blocks], or null
  const uint8_t* q8;            // [blocks]
  const float* scale_values;    // [256]
  const float* absmax2;         // [ceil(blocks / 256)], or null
  float offset;
  bool has_bf16_scales;         // of half_scales; else fp16
  int block_shift;              // log2(blocksize)
  bool has_int8;                // bytes are int8; else E4M3
  int row_shift;                // of bytes
  int64_t cols, blocks_in_row;  // of bytes
};

// A row-major matrix, read panel by panel: dense, or NF4 when `nf4` is set.
struct MatrixView {
  const void* data;
  DType dtype;
  int64_t ld;  // elements from one row to the next
  const Nf4View* nf4;
};

// Which elements of flat activations dropout keeps: element e if word e % 4 of block e / 4 of Philox4x32-10
// is at least `threshold`. The seed is the key; the block index is the low half of the counter, `stream` its
// third word and `last` its fourth.
struct DropoutMask {
  uint64_t seed;
  uint32_t stream;
  uint32_t threshold;  // 0: keeps all
  float scale;         // factor of the elements kept
  int64_t ld;          // elements from one row of the activations to the next
  uint32_t last = 0;
};

// One matrix product added to the output. In a base layer with adapters the later terms are LoRA deltas: they
// accumulate in the same fp32 tile, so the output is rounded once.
struct GemmTerm {
  const void* lhs;  // [m, depth]
  DType lhs_dtype;
  int64_t lhs_ld;
  MatrixView rhs;  // gemm_nt: [n, depth];  gemm_nn: [depth, n]
  float rhs_scale;
  int64_t depth;
  int64_t m_begin = 0, m_end = INT64_MAX;  // rows of the output that the term is added to
  DropoutMask mask{};                      // gemm_nn: applied to the term before it is added
};

// The kernel of a gemm_nt: kDots (linear_nt.inl), kGemv for a packed weight and few rows (linear_gemv.inl),
// or gemm_packed with lhs packed as pairs of bf16 or as fp32.
enum class NtPlan : uint8_t { kDots, kGemv, kPairs, kFloats };

// out[m, n] = start + sum over terms of lhs . rhs, where start is the bias, the contents of `out`, or 0. If
// there is a residual, the sum is added to it; a sum of 0, of either sign, leaves its bits unchanged.
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
  const void* residual;  // gemm_nt and gemm_nn: same layout as `out`; or null
};

// Packs rows [rows, depth] for gemm_packed: strips of kPackRows rows, within a strip the vectors of one
// register tile, within those one step of the depth after another, each step with its rows side by side
// (padded to whole vectors), in the order of linear_packed_units.inl.
struct PackParams {
  const void* x;
  DType dtype;
  int64_t rows, depth;
  NtPlan plan;
  void* out;  // [rows rounded up to whole vectors, depth rounded up to kPackDepth]
};
inline constexpr int64_t kPackRows = 64;
inline constexpr int64_t kPackDepth = 64;  // a multiple of every unit's kOrder

// Up to this many rows use a packed weight without packing lhs (linear_gemv.inl).
inline constexpr int64_t kFewRows = 8;
// Terms of at most this depth, such as LoRA deltas, are thin: summing across lanes would cost more than the
// multiplications.
inline constexpr int64_t kThinDepth = 64;
// The same limit for fp32 rows and a dense fp32 weight (linear_gemv_dense.inl).
inline constexpr int64_t kFewFloatRows = 16;

// The part of the output computed by one task.
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

// Double quantisation of the absmax, in groups of nf4::kAbsmaxBlock.
struct AbsmaxParams {
  const float* absmax;  // [blocks]
  int64_t blocks;
  float offset;
  uint8_t* q8;     // [blocks]
  float* absmax2;  // [groups]
};

// out[i] = x[i] * mask.scale where the mask keeps i, else 0.
struct DropoutParams {
  const void* x;
  DType dtype;  // of x and out
  DropoutMask mask;
  void* out;
};

// Forward: out = activation(gate) * up. Backward: writes d_gate and d_up. All tensors have one dtype.
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
  const float* d;  // backward: gradient of the output
  const void* dy;  // added to dx, or null
  void* dx;        // or null
  float* sums;     // [2, features]: gradients of weight and bias, over these rows
};

// The hidden layer of a bottleneck adapter: `value` is z after activation, dropout and scaling, in fp32
// and/or rounded to bf16. Elements [begin, end) of z and d; the outputs are written from their first element
// on.
struct BottleneckParams {
  const float* z;
  Activation activation;
  DropoutMask mask;
  float scaling;
  float* value;
  BF16* rounded_value;
  float* d;  // in: gradient of value, out: gradient of z; null in forward
  BF16* rounded_d;
};

// out[c, r] = copy[r, c] = scale * x[r, c].
inline constexpr int64_t kTransposeRows = 16;  // a multiple of every ISA's lanes
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

// y = z + (scale - 1) * (z - bias), per column: everything but the bias is scaled. Bit-identical to z where
// scale is 1.
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

// Running state of one row's softmax: the maximum without the label's logit; without the label's, the sums of
// e = e^(z - max), of z e and of e^2; the label's logit; the sum of all logits.
struct SoftmaxState {
  float max, sum, weighted, squares, label, total;
};

// A tile of logits, `cols` columns from `first_col` on; updates the states of its rows.
inline constexpr int64_t kSoftmaxCols = 1024;  // at most
inline constexpr float kNegligible = 1e4f;     // an exponential this far below the maximum is negligible
inline constexpr float kMasked = 1e30f;        // below minus this a logit is masked: its probability is 0
struct SoftmaxParams {
  void* logits;  // [rows, logits_ld]; overwritten
  DType logits_dtype;
  int64_t logits_ld, first_col, cols;
  const float* bias;  // [cols] or null; added first
  float scale;        // then logits are multiplied by this
  float cap;          // then become cap * tanh(z / cap), unless 0
  const int64_t* labels;
  SoftmaxState* states;
  bool need_weighted, need_squares, need_total;
  // For the backward: e^(z - max) times the derivative of the softcap, 0 for the label; or null. May alias
  // the logits, which are read first.
  void* out;
  DType out_dtype;
  int64_t out_ld;
  float* sums;  // [rows, features] or null: sums of earlier tiles, rescaled here to the new maximum
  int64_t features;
};

// The gradient of the loss by one row of x, from sums over parts of the vocabulary: out = the sum over parts
// of factors[part] * sums[part], + label_factor * the label's row of the weight, + mean_factor * mean.
inline constexpr int64_t kSoftmaxDxRun = 512;
struct SoftmaxDxParams {
  const float* sums;  // [parts, part_ld], the first `features`
  const float* factors;
  int64_t parts, part_ld, features;
  MatrixView weight;
  int64_t label;
  float label_factor;
  const float* mean;  // [features] or null
  float mean_factor;
  void* out;
  DType dtype;
};

// The gradient of the logits, given each row's log-sum-exp and factors: replaces a tile of the head's
// outputs by its gradient.
struct LogitGradientParams {
  float* logits;  // [rows, cols]: in: logits, out: their gradients
  void* rounded;  // [rows, cols] of dtype, or null
  DType dtype;
  int64_t first_col, cols, vocabulary;
  const float* bias;  // [cols] or null
  float scale, cap;   // as in SoftmaxParams
  const int64_t* labels;
  // Per row: the gradient of a logit z is p (of_p + of_pz z), and -of_label is added to the label's.
  const float *lse, *of_label, *of_p;
  const float* of_pz;  // or null
  float smoothing;
};

// Attention of the query heads that share one head of keys and values, in one sequence.
struct AttentionParams {
  const void *q, *k, *v;  // rows of `features`, contiguous
  DType dtype;            // of all tensors but softmax and the sums
  int64_t q_head, q_ld;   // strides between heads, and between rows
  int64_t k_ld, v_ld;
  int64_t heads, rows, keys, features;
  // [rows, span_count, 2] or null: the spans [first, last) of keys that each row attends to.
  const int32_t* spans;
  int64_t span_count;  // 1 or 2
  // Of the weights, in the order [head][row / kAttentionPad][key][row % kAttentionPad]: ld is from one head
  // to the next, and the first head begins at element mask_first.
  DropoutMask mask;
  int64_t mask_first;
  bool is_causal;  // no keys after the row's own, aligned so that the last row sees the last key
  float scale;     // of scores; positive
  void* out;       // backward: the forward's output
  int64_t out_head, out_ld;
  float* softmax;  // [heads, 2, rows]: maximum score, and 1 / sum of exponentials; both 0 without a key
  const void* dy;  // backward
  int64_t dy_head, dy_ld;
  void* dq;
  int64_t dq_head, dq_ld;
  float *dk_sums, *dv_sums;  // [keys, features], both rounded up to kAttentionPad; accumulated
};
inline constexpr int64_t kAttentionPad = 64;

// RMS norm of rows, and its gradients.
struct RmsNormParams {
  const void* x;  // [m, features]
  DType dtype;    // of x and dx
  int64_t features;
  const float* weight;
  float eps;
  DType out_dtype;  // of out and dy: that of x or fp32; any where x is fp32
  void* out;
  float* rstd;                // [m]; backward: from the forward
  const void* dy;             // backward
  void* dx;                   // or null
  float* sums;                // [features] or null: gradient of the weight
  bool rounds = true;         // rounds the normalised values to x's dtype before multiplying by the weight
  const void* add = nullptr;  // backward: same layout as dx, added to it; or null
  // add_rms_norm: sum = residual + branch, and x is sum. The residual has sum's dtype, and so has the branch
  // unless sum is fp32.
  const void* branch = nullptr;
  DType branch_dtype = DType::kF32;
  const void* residual = nullptr;
  void* sum = nullptr;
};

// out = x, or x + residual, rounded to out's dtype; contiguous elements.
struct CastParams {
  const void* x;
  DType dtype;
  const void* residual;  // or null
  DType residual_dtype;
  void* out;
  DType out_dtype;
};

// Rotary embedding of [sequences, rows, heads, features].
struct RotaryParams {
  const void* x;  // features are contiguous
  DType dtype;
  int64_t x_sequence, x_row, x_head;  // strides
  int64_t rows, heads, features;
  const float *cos, *sin;  // [sequences or 1, rows, features]
  int64_t angle_sequence;  // stride between sequences, or 0
  bool rounds;             // rounds products and their sum to x's dtype
  bool inverse;            // rotates back
  void* out;               // contiguous
  DType out_dtype;
};

enum class StepKind : uint8_t { kAdamW, kAdam, kLion };

// One parameter of an optimizer step, flat, with the coefficients defined in ops/optim/adamw.py.
struct StepTensor {
  void* param;
  const void* grad;  // of param's dtype
  DType dtype;
  void* state1;  // float, or 8-bit codes where there is an absmax
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
  float factor;     // multiplies the gradients
  bool stochastic;  // stochastic rounding of bf16
  uint64_t seed;
};

// Scratch of each task, 64-byte aligned. Sized to share a 1 MB L2 with the data that streams through it.
inline constexpr int64_t kScratchBytes = 896 * 1024;

}  // namespace peft_kernels::cpu
