// A step of AdamW, Adam or Lion for all parameters (peft_kernels/ops/optim). Device-side values may change
// between steps without the host knowing, so a graph can contain one.
#pragma once

#include "../core/kernels.h"

namespace peft_kernels::cuda {

// One parameter.
struct StepTensor {
  void* param;
  void* state1;  // fp32, or codes if there is an absmax1
  void* state2;
  float* absmax1;
  float* absmax2;
  void* compensation;   // or null
  int64_t numel;        // at least 1
  int64_t first_block;  // number of moment blocks before it
  DType dtype;          // of param and gradient
  int32_t index;        // among all parameters: in `step`, and the random stream
  int32_t group;
  bool has_vectors;  // all but the gradient are 16-byte aligned
};
// The hyperparameters of a group.
struct StepGroup {
  double beta1, beta2, eps, weight_decay;
};
struct Step {
  const StepTensor* tensors;  // [count]; this and all below are on the device
  const void* const* grads;   // [count]
  const StepGroup* groups;
  const int64_t* step;
  const float* lr;          // by group
  const float* grad_scale;  // or null: 1
  const float* found_inf;   // or null: 0
  const int64_t* seed;      // or null: rounds bf16 to nearest
  int64_t blocks;           // moment blocks of all parameters
  int count;
  bool decay_into_gradient;  // "adam"
};
// max_norm > 0: clips the total norm of gradients to it. With `factor` (on the device), max_norm and
// grad_scale are ignored.
void adamw_step(const Step& step, bool is_lion, float max_norm, const float* factor, Context& context);

// Writes the factor that gradients are multiplied by. Uses only numel, dtype and first_block of step.tensors,
// and step.grads, grad_scale, blocks and count.
void clip_factor(const Step& step, float max_norm, float* factor, Context& context);

// Copies `count` words of 8 bytes to the device as kernel arguments, in several launches if necessary: the
// caller's copy can be freed at once, and a captured graph has its own.
void store_table(const uint64_t* words, int64_t count, uint64_t* out, Stream stream);

}  // namespace peft_kernels::cuda
