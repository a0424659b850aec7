// Launches the kernels of adapters that serve different rows.
#include "bottleneck_launch.cuh"
#include "group_sums.cuh"
#include "multi_bottleneck.h"

namespace peft_kernels::cuda {
namespace {

using Any = BottleneckGroups<bf16, true, false>;

// Calls body(first, count) for as many of `total` at a time as the parameters of a kernel can hold.
template <class Body>
void in_parts(size_t total, int most, const Body& body) {
  for (size_t first = 0; first < total; first += most) {
    body(static_cast<int>(first), static_cast<int>(std::min<size_t>(total - first, most)));
  }
}

// The adapters, followed by one without ranks for the rows of no adapter: their result is the term.
template <bool kBackward>
std::vector<BottleneckAdapter> all_adapters(const MultiBottleneckView& view) {
  std::vector<BottleneckAdapter> adapters;
  for (const BottleneckView& one : view.adapters) adapters.push_back(adapter_of<kBackward>(one));
  adapters.push_back(adapter_of<kBackward>({}));
  return adapters;
}

template <bool kBackward>
void run(const MultiBottleneckView& view, const void* in, BottleneckMatrices matrices, const void* term,
         void* out, Stream stream) {
  const int64_t in_features = kBackward ? view.n : view.k, out_features = kBackward ? view.k : view.n;
  matrices.vectors = matrices.vectors && view.ranks % 4 == 0;
  const std::vector<BottleneckAdapter> adapters = all_adapters<kBackward>(view);
  in_parts(adapters.size(), Any::kMaxAdapters, [&](int first, int count) {
    bool vectors = has_vectors(in, in_features) && has_vectors(out, out_features) && are_aligned({term});
    int bytes = 0;
    for (int i = first; i < first + count; ++i) {
      vectors = vectors && has_aligned_factors<kBackward>(adapters[i]);
      bytes = std::max(bytes, shared_bytes(adapters[i]));
    }
    with_kernel(view.dtype, vectors, [&](auto type, auto vector) {
      using T = decltype(type);
      using Kernel = BottleneckGroups<T, vector.value, kBackward>;
      typename Kernel::Params params{};
      params.in = static_cast<const T*>(in);
      params.in_features = in_features;
      params.out_features = out_features;
      params.matrices = matrices;
      params.matrices_ld = view.ranks;
      params.term = static_cast<const T*>(term);
      params.out = static_cast<T*>(out);
      params.listed = view.rows.listed;
      params.order = view.rows.order;
      params.first = first;
      params.adapters = count;
      std::copy_n(adapters.data() + first, count, params.adapter);
      launch<Kernel>(params, view.rows.listed.max_tiles, stream, bytes);
    });
  });
}

}  // namespace

int multi_bottleneck_tile_rows() { return Any::kRows; }

void multi_bottleneck(const MultiBottleneckView& view, const void* x, const void* residual, float* z, void* y,
                      Stream stream) {
  run<false>(view, x, matrices_of(z, nullptr, nullptr), residual, y, stream);
}

void multi_bottleneck_backward(const MultiBottleneckView& view, const void* dy, const float* z,
                               const void* term, float* value, float* dz, void* dx, Stream stream) {
  run<true>(view, dy, matrices_of(z, value, dz), term, dx, stream);
}

void sum_groups(const GroupedRows& rows, const void* x, DType dtype, int64_t ld,
                const std::vector<GroupSum>& sums, Stream stream) {
  int64_t most_columns = 0;
  for (const GroupSum& one : sums) most_columns = std::max<int64_t>(most_columns, one.columns);
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    using Kernel = SumGroups<T>;
    in_parts(sums.size(), Kernel::kMaxGroups, [&](int first, int count) {
      typename Kernel::Params params{};
      params.x = static_cast<const T*>(x);
      params.ld = ld;
      params.ranges = rows.listed.ranges + first;
      params.order = rows.order;
      params.blocks = static_cast<int>(ceil_div(most_columns, kWarp));
      std::copy_n(sums.data() + first, count, params.sum);
      launch<Kernel>(params, int64_t{count} * params.blocks, stream, sizeof(typename Kernel::Shared));
    });
  });
}

}  // namespace peft_kernels::cuda
