// Checked arguments of gated activations.
#pragma once

#include <ATen/ATen.h>

#include "activation.h"
#include "checks.h"

namespace peft_kernels {

inline Activation activation_of(c10::string_view name) {
  if (name == "silu") return Activation::kSilu;
  if (name == "gelu") return Activation::kGelu;
  if (name == "gelu_tanh") return Activation::kGeluTanh;
  TORCH_CHECK(name == "relu", "activation: expected silu, gelu, gelu_tanh or relu, got ", name);
  return Activation::kRelu;
}

// The arguments common to both directions of gated_activation.
struct GatedArgs {
  Tensor gate, up;
  DType dtype;  // of all tensors
  Activation activation;

  GatedArgs(const Tensor& gate_in, const Tensor& up_in, c10::string_view name)
      : gate(gate_in.contiguous()),
        up(matching(up_in, gate_in, "up")),
        dtype(dtype_of(gate_in, "gate")),
        activation(activation_of(name)) {}
};

}  // namespace peft_kernels
