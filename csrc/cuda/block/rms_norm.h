// RMS norms of rows and their gradients (rms_norm.cu, rms_norm_backward.cu).
#pragma once

#include "../core/kernels.h"

namespace peft_kernels::cuda {

// The rows, and how they are normalised: (weight + offset) * x * rstd. All pointers are 16-byte aligned.
struct NormRows {
  int64_t m, features;
  float per_feature;  // 1 / features
  DType dtype;        // of the normalised rows, called T below
  const void* weight;
  DType weight_dtype;
  float offset;
  bool rounds;  // x * rstd is rounded to T before it is multiplied
};

// out = norm of x, or of sum = x + residual, and rstd = 1 / rms of each row.
struct RmsNormForward {
  NormRows rows;
  const void* x;
  DType x_dtype;         // T; with a residual any where T is fp32
  const void* residual;  // of T, or null
  void* sum;             // of T, null without a residual
  float eps;
  void* out;
  DType out_dtype;  // T or fp32; any where T is fp32
  float* rstd;      // [m]
};
void rms_norm(const RmsNormForward& params, const Card& card, Stream stream);

struct RmsNormGradient {
  NormRows rows;
  const void* dy;
  DType dy_dtype;  // as out_dtype
  const void* x;   // of T, like add and dx
  const float* rstd;
  const void* add;  // added to dx; or null
  void* dx;         // or null: not needed
  void* dweight;    // of the weight's dtype; or null
};
void rms_norm_backward(const RmsNormGradient& params, Context& context);

}  // namespace peft_kernels::cuda
