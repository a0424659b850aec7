// Bottleneck adapters (bottleneck.cu): like LoRA, with an activation between the two GEMMs.
#pragma once

#include "../../common/activation.h"
#include "../lora/lora.h"

namespace peft_kernels::cuda {

// Activations are bf16 or fp16; matrices between the GEMMs and biases are fp32. As in LoRA, fp32 values are
// never rounded to a narrower type in between.
struct BottleneckView {
  DType dtype;  // of the activations
  int64_t m, k, n;
  int rank;
  const void* down;            // [rank, k]
  const void* up;              // [n, rank]
  DType down_dtype, up_dtype;  // fp32, or the activations' own
  Activation activation;
  float scaling;
  DropoutMask mask;        // of [the adapter's rows, rank]
  const float* down_bias;  // [rank] or null, as is up_bias [n]; backward does not need them
  const float* up_bias;
};

// Whether the kernel that does both GEMMs takes as many ranks.
bool takes_ranks(int64_t rank);

// Whether it does both GEMMs of one adapter. Its blocks have 32 rows and keep the intermediate values in
// shared memory, so it needs at most 256 ranks and at least one block per multiprocessor. Otherwise both
// GEMMs use the LoRA kernels, which split long sums, with bottleneck_between() in between.
bool is_fused(const BottleneckView& view, const Card& card);

// z [m, rank] = x down^T + down_bias; y [m, n] = residual + scaling (drop(activation(z)) up^T + up_bias).
// Fused.
void bottleneck(const BottleneckView& view, const void* x, const void* residual, float* z, void* y,
                Stream stream);
// value = drop(activation(z)); dz = drop(scaling dy up) activation'(z); dx [m, k] = term + dz down. The term
// may be null, and so may any result. Fused.
void bottleneck_backward(const BottleneckView& view, const void* dy, const float* z, const void* term,
                         float* value, float* dz, void* dx, Stream stream);
// z, which holds x down^T, += down_bias; also computes value.
void bottleneck_between(const BottleneckView& view, float* z, float* value, Stream stream);
// dz, which holds scaling dy up, and value; either may be null.
void bottleneck_between_backward(const BottleneckView& view, const float* z, float* value, float* dz,
                                 Stream stream);

}  // namespace peft_kernels::cuda
