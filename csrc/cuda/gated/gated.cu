// Launches Gated: activation(gate) * up and its gradients.
#include "../core/launch.cuh"
#include "gated.cuh"
#include "gated.h"

namespace peft_kernels::cuda {
namespace {

template <class Kernel>
void run(typename Kernel::Params params, Stream stream) {
  if (are_aligned({params.gate, params.up, params.dy, params.out[0], params.out[1]})) {
    params.vectors = params.count / Kernel::kWidth;
  }
  const int64_t threads = params.count - params.vectors * (Kernel::kWidth - 1);
  launch<Kernel>(params, ceil_div(threads, Kernel::kThreads), stream);
}

template <bool kBackward>
void gated(Activation activation, DType dtype, const void* gate, const void* up, const void* dy,
           int64_t count, void* first, void* second, Stream stream) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const GatedParams<T> params{static_cast<const T*>(gate),
                                static_cast<const T*>(up),
                                static_cast<const T*>(dy),
                                count,
                                0,
                                {static_cast<T*>(first), static_cast<T*>(second)}};
    switch (activation) {
      case Activation::kSilu:
        return run<Gated<T, Activation::kSilu, kBackward>>(params, stream);
      case Activation::kGelu:
        return run<Gated<T, Activation::kGelu, kBackward>>(params, stream);
      case Activation::kGeluTanh:
        return run<Gated<T, Activation::kGeluTanh, kBackward>>(params, stream);
      default:
        return run<Gated<T, Activation::kRelu, kBackward>>(params, stream);
    }
  });
}

}  // namespace

void gated_activation(Activation activation, const void* gate, const void* up, DType dtype, int64_t count,
                      void* out, Stream stream) {
  gated<false>(activation, dtype, gate, up, nullptr, count, out, nullptr, stream);
}

void gated_activation_backward(Activation activation, const void* dy, const void* gate, const void* up,
                               DType dtype, int64_t count, void* d_gate, void* d_up, Stream stream) {
  gated<true>(activation, dtype, gate, up, dy, count, d_gate, d_up, stream);
}

}  // namespace peft_kernels::cuda
