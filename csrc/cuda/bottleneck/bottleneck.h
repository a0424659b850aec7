// Bottleneck adapters (bottleneck.cu): LoRA's with an activation between their products.
#pragma once

#include "../core/kernels.h"

namespace peft_kernels::cuda {

// Activations are bf16 or fp16; matrices between the products, and biases, are fp32. Like LoRA's: no fp32
// number is rounded to less on its way.
struct BottleneckView {
  DType dtype;  // of the activations
  int64_t m, k, n;
  int rank;
  const void* down;            // [rank, k]
  const void* up;              // [n, rank]
  DType down_dtype, up_dtype;  // fp32, or the activations' own
  Activation activation;
  float scaling;
  DropoutMask mask;  // of [m, rank]
};

// Whether one kernel goes all the way, forward or back. Its blocks have 32 rows each, and what is between the
// products in shared memory, of 256 ranks at most; there must be a block for each multiprocessor. Else the
// products are those of LoRA's adapters, which cut long sums into parts, with bottleneck_between() between.
bool is_fused(const BottleneckView& view, const Card& card);

// z [m, rank] = x down^T + down_bias; y [m, n] = residual + scaling (drop(activation(z)) up^T + up_bias).
// Biases may be null. Fused.
void bottleneck(const BottleneckView& view, const void* x, const void* residual, const float* down_bias,
                const float* up_bias, float* z, void* y, Stream stream);
// value = drop(activation(z)); dz = drop(scaling dy up) activation'(z); dx [m, k] = term + dz down. The term
// may be null, and so may any result. Fused.
void bottleneck_backward(const BottleneckView& view, const void* dy, const float* z, const void* term,
                         float* value, float* dz, void* dx, Stream stream);
// z, which is x down^T so far, += down_bias; value.
void bottleneck_between(const BottleneckView& view, const float* down_bias, float* z, float* value,
                        Stream stream);
// dz, which is scaling dy up so far; value. Either may be null.
void bottleneck_between_backward(const BottleneckView& view, const float* z, float* value, float* dz,
                                 Stream stream);

// Of lora_expand.cu: y [m, n] = term + scaling (h B^T + bias) of the only adapter, rounded once; the bias may
// be null.
void lora_y(const LoraBatch& batch, int64_t n, const float* h, const void* term, const float* bias, void* y,
            Stream stream);

}  // namespace peft_kernels::cuda
