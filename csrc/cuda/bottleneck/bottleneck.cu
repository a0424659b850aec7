// Launches the kernels of one adapter: both GEMMs in one, or the step between them.
#include "bottleneck_launch.cuh"

namespace peft_kernels::cuda {
namespace {

int64_t blocks_of(const BottleneckView& view) { return ceil_div(view.m, AnyBottleneck::kRows); }

template <bool kBackward>
void run(const BottleneckView& view, const void* in, const BottleneckMatrices& matrices, const void* term,
         void* out, Stream stream) {
  const int64_t in_features = kBackward ? view.n : view.k, out_features = kBackward ? view.k : view.n;
  const BottleneckAdapter adapter = adapter_of<kBackward>(view);
  const bool vectors = has_vectors(in, in_features) && has_vectors(out, out_features) &&
                       are_aligned({term}) && has_aligned_factors<kBackward>(adapter);
  with_kernel(view.dtype, vectors, [&](auto type, auto vector) {
    using T = decltype(type);
    using Kernel = BottleneckRows<T, vector.value, kBackward>;
    typename Kernel::Params params{};
    params.in = static_cast<const T*>(in);
    params.m = view.m;
    params.in_features = in_features;
    params.out_features = out_features;
    params.matrices = matrices;
    params.term = static_cast<const T*>(term);
    params.out = static_cast<T*>(out);
    params.adapter[0] = adapter;
    launch<Kernel>(params, blocks_of(view), stream, shared_bytes(adapter));
  });
}

template <bool kBackward>
void between(const BottleneckView& view, const BottleneckMatrices& matrices, Stream stream) {
  using Kernel = BottleneckBetween<kBackward>;
  const int64_t count = view.m * view.rank;
  launch<Kernel>({count, step_of(view), matrices}, ceil_div(count, 4 * Kernel::kThreads), stream);
}

}  // namespace

bool takes_ranks(int64_t rank) { return rank <= AnyBottleneck::kMostRanks; }

bool is_fused(const BottleneckView& view, const Card& card) {
  return takes_ranks(view.rank) && blocks_of(view) >= card.sms;
}

void bottleneck(const BottleneckView& view, const void* x, const void* residual, float* z, void* y,
                Stream stream) {
  run<false>(view, x, matrices_of(z, nullptr, nullptr), residual, y, stream);
}

void bottleneck_backward(const BottleneckView& view, const void* dy, const float* z, const void* term,
                         float* value, float* dz, void* dx, Stream stream) {
  run<true>(view, dy, matrices_of(z, value, dz), term, dx, stream);
}

void bottleneck_between(const BottleneckView& view, float* z, float* value, Stream stream) {
  between<false>(view, matrices_of(z, value, nullptr), stream);
}

void bottleneck_between_backward(const BottleneckView& view, const float* z, float* value, float* dz,
                                 Stream stream) {
  between<true>(view, matrices_of(z, value, dz), stream);
}

}  // namespace peft_kernels::cuda
