// activation(gate) * up and its gradients, as peft_kernels/ops/gated.py has them.
#pragma once

#include "../common/activation.h"
#include "device.cuh"

namespace peft_kernels::cuda {

// 1 / (1 + e^-x), and 1 minus that without cancellation. By e^-|x|, which cannot overflow.
struct Sigmoid {
  float value, rest;
};
DEVICE Sigmoid sigmoid(float x) {
  const float e = expf(x < 0.0f ? x : -x), large = reciprocal(1.0f + e), small = e * large;
  return {x < 0.0f ? small : large, x < 0.0f ? large : small};
}

struct ValueSlope {
  float value, slope;
};

template <Activation kActivation>
DEVICE ValueSlope activate(float x) {
  if constexpr (kActivation == Activation::kRelu) return {x < 0.0f ? 0.0f : x, x > 0.0f ? 1.0f : 0.0f};
  // From here on down all others are 0; -Inf times 0 would be none.
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

// All tensors have `count` elements. A thread takes 16 bytes of each, or one element of those that are left.
template <class T>
struct GatedParams {
  const T* gate;
  const T* up;
  const T* dy;  // backward
  int64_t count;
  int64_t vectors;  // how many times 16 bytes, 0 where they are not aligned
  T* out[2];        // forward: the result; backward: the gradients of gate and up
};

template <class T, Activation kActivation, bool kBackward>
struct Gated {
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerSm = 4;
  static constexpr int kWidth = 16 / sizeof(T);
  using Params = GatedParams<T>;

  static DEVICE void run(const Params& p) {
    const int64_t i = int64_t{block_index()} * kThreads + thread_index();
    const int64_t single = p.vectors * (kWidth - 1) + i;
    if (i < p.vectors) {
      run_at<kWidth>(p, i * kWidth);
    } else if (single < p.count) {
      run_at<1>(p, single);
    }
  }

 private:
  template <int kCount>
  static DEVICE void run_at(const Params& p, int64_t at) {
    using Elements = Vec<T, kCount>;
    const auto gate = load_constant(reinterpret_cast<const Elements*>(p.gate + at));
    const auto up = load_constant(reinterpret_cast<const Elements*>(p.up + at));
    Elements dy{}, out[2];
    if constexpr (kBackward) dy = load_constant(reinterpret_cast<const Elements*>(p.dy + at));
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const ValueSlope a = activate<kActivation>(to_float(gate.v[i]));
      if constexpr (kBackward) {
        const float d = to_float(dy.v[i]);
        out[0].v[i] = from_float<T>(d * to_float(up.v[i]) * a.slope);
        out[1].v[i] = from_float<T>(d * a.value);
      } else {
        out[0].v[i] = from_float<T>(a.value * to_float(up.v[i]));
      }
    }
#pragma unroll
    for (int j = 0; j < 1 + kBackward; ++j) store(reinterpret_cast<Elements*>(p.out[j] + at), out[j]);
  }
};

}  // namespace peft_kernels::cuda
