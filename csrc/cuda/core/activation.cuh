// Activation functions and their derivatives, as in peft_kernels/ops/gated.
#pragma once

#include "../../common/activation.h"
#include "device.cuh"

namespace peft_kernels::cuda {

// 1 / (1 + e^-x), and 1 minus that without cancellation. Computed from e^-|x|, which cannot overflow.
struct Sigmoid {
  float value, rest;
};
DEVICE Sigmoid sigmoid(float x) {
  const float e = expf(x < 0.0f ? x : -x), large = reciprocal(1.0f + e), small = e * large;
  return {x < 0.0f ? small : large, x < 0.0f ? large : small};
}

struct ValueGradient {
  float value, gradient;
};

template <Activation kActivation>
DEVICE ValueGradient activate(float x) {
  if constexpr (kActivation == Activation::kRelu) return {x < 0.0f ? 0.0f : x, x > 0.0f ? 1.0f : 0.0f};
  // Below this all other activations are 0; clamped because -Inf times 0 is NaN.
  constexpr float kLowest = -256.0f;
  if (x < kLowest) x = kLowest;
  if constexpr (kActivation == Activation::kSilu) {
    const Sigmoid s = sigmoid(x);
    return {x * s.value, s.value * __fmaf_rn(x, s.rest, 1.0f)};
  } else if constexpr (kActivation == Activation::kGelu) {
    const float cdf = __fmaf_rn(erff(x * 0.70710678118f), 0.5f, 0.5f);
    const float density = expf(x * x * -0.5f) * 0.3989422804f;
    return {x * cdf, __fmaf_rn(x, density, cdf)};
  } else {
    // (1 + tanh u) / 2 = sigmoid(2u) with 2u = x * (k2 + c2 x^2).
    constexpr float k2 = 2 * 0.7978845608f, c2 = k2 * 0.044715f;
    const float square = x * x;
    const Sigmoid s = sigmoid(x * __fmaf_rn(square, c2, k2));
    const float inner = __fmaf_rn(square, 3 * c2, k2);  // the derivative of 2u
    const float value = x * s.value;
    return {value, __fmaf_rn(value * s.rest, inner, s.value)};
  }
}

}  // namespace peft_kernels::cuda
