// activation(gate) * up and its gradients, as in peft_kernels/ops/gated.
#pragma once

#include "../core/activation.cuh"

namespace peft_kernels::cuda {

// All tensors have `count` elements. A thread has 16 bytes of each, or one of the elements left over.
template <class T>
struct GatedParams {
  const T* gate;
  const T* up;
  const T* dy;  // backward
  int64_t count;
  int64_t vectors;  // number of 16-byte vectors, 0 if tensors are not aligned
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
      const ValueGradient a = activate<kActivation>(to_float(gate.v[i]));
      if constexpr (kBackward) {
        const float d = to_float(dy.v[i]);
        out[0].v[i] = from_float<T>(d * to_float(up.v[i]) * a.gradient);
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
