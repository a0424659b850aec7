// A step of AdamW, Adam or Lion for all parameters (peft_kernels/ops/optim.py). What is on the device may
// change between steps without the host knowing, so a graph can hold one.
#pragma once

#include "../core/kernels.h"

namespace peft_kernels::cuda {

// One parameter.
struct StepTensor {
  void* param;
  void* state1;  // fp32, or codes where there is an absmax1
  void* state2;
  float* absmax1;
  float* absmax2;
  void* compensation;   // or null
  int64_t numel;        // at least 1
  int64_t first_block;  // how many blocks of a moment are before it
  DType dtype;          // of param and gradient
  int32_t index;        // among all parameters: in `step`, and the stream of random numbers
  int32_t group;
  bool has_vectors;  // all but the gradient are aligned to 16 bytes
};
// What its parameters share.
struct StepGroup {
  double beta1, beta2, eps, weight_decay;
};
struct Step {
  const StepTensor* tensors;  // [count], on the device, as is all below
  const void* const* grads;   // [count]
  const StepGroup* groups;
  const int64_t* step;
  const float* lr;          // by group
  const float* grad_scale;  // or null: 1
  const float* found_inf;   // or null: 0
  const int64_t* seed;      // or null: bf16 to nearest
  int64_t blocks;           // of moments, of all
  int count;
  bool decay_into_gradient;  // "adam"
};
// max_norm > 0: gradients together are no longer than that. With a factor (on the device) neither it nor
// grad_scale counts.
void adamw_step(const Step& step, bool is_lion, float max_norm, const float* factor, Context& context);

// Writes what gradients are multiplied by to the device. Of `step` it needs numel, dtype and first_block of
// tensors, and grads, grad_scale, blocks and count.
void clip_factor(const Step& step, float max_norm, float* factor, Context& context);

// Writes `words` words of 8 bytes to the device. They travel as arguments of kernels, several for many: the
// caller's are free at once, and a graph holds its own.
void store_table(const uint64_t* words, int64_t count, uint64_t* out, Stream stream);

}  // namespace peft_kernels::cuda
