// The loss of rows of logits, and the gradients of the logits (cross_entropy.cu).
#pragma once

#include "../core/kernels.h"

namespace peft_kernels::cuda {

// As in peft_kernels/ops/loss: z = softcap(scale * logit).
struct LossOptions {
  int64_t vocabulary, ignore_index;
  float scale, cap;  // cap 0: none
  float smoothing, z_loss;
};

// [count, ld], overwritten by gradients where they are needed.
struct LogitRows {
  void* logits;
  DType dtype;
  int64_t count, ld;
};

// One per row of the call.
struct LossResults {
  float *loss, *lse;
  float *entropy, *mean, *squares;  // or null
  bool* top;                        // with the entropy
};

// The losses of rows of logits, and with `need_gradient` their gradients with respect to them, in place. Row
// i of the logits is row rows[i] of labels and results, or first_row + i if `rows` is null. A row whose label
// is ignore_index has zeros; one whose label is outside the vocabulary has a NaN loss.
void cross_entropy(const LogitRows& logits, const LossOptions& options, const int64_t* labels,
                   const int64_t* rows, int64_t first_row, const LossResults& results, bool need_gradient,
                   Stream stream);

// One per row: the gradient of a logit z is p (of_p + of_pz z), and -of_label is added to the label's.
struct LogitFactors {
  const float *lse, *of_label, *of_p;
  const float* of_pz;  // or null
};

// Overwrites columns [first_col, first_col + cols) of all rows of logits by their gradients.
void cross_entropy_backward(const LogitRows& logits, int64_t first_col, int64_t cols,
                            const LossOptions& options, const int64_t* labels, const LogitFactors& factors,
                            Stream stream);

}  // namespace peft_kernels::cuda
