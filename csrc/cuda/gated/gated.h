// Gated activations (gated.cu).
#pragma once

#include "../../common/activation.h"
#include "../core/kernels.h"

namespace peft_kernels::cuda {

// out = activation(gate) * up, and its gradients. All of one type and size.
void gated_activation(Activation activation, const void* gate, const void* up, DType dtype, int64_t count,
                      void* out, Stream stream);
void gated_activation_backward(Activation activation, const void* dy, const void* gate, const void* up,
                               DType dtype, int64_t count, void* d_gate, void* d_up, Stream stream);

}  // namespace peft_kernels::cuda
