// Launches ScaleColumns and its backward.
#include "../core/launch.cuh"
#include "../core/sum_splits.cuh"
#include "dora.h"
#include "dora_scale.cuh"

namespace peft_kernels::cuda {
namespace {

// Whether rows can be read and written in vectors of 16 bytes; `in` and `out` are the tensors other than z.
template <class T>
bool has_vectors(const DoraScale& params, const void* in, const void* out) {
  return params.n % kScaleWidth<T, true> == 0 && are_aligned({params.z, params.scale, params.bias, in, out});
}

template <class T, bool kVector>
void scale_columns(const DoraScale& params, void* y, Stream stream) {
  using Kernel = ScaleColumns<T, kVector>;
  using Elements = typename Kernel::Elements;
  const int64_t width = params.n / Kernel::kWidth, column_blocks = ceil_div(width, kWarp);
  launch<Kernel>({static_cast<const Elements*>(params.z), params.scale, params.bias, params.m, width,
                  column_blocks, static_cast<Elements*>(y)},
                 column_blocks * ceil_div(params.m, Kernel::kRowsOfBlock), stream);
}

// The strips of rows for the gradient of `scale`. The same for all types and alignments, although the number
// of columns per block differs.
struct Strips {
  int64_t rows;
  int count;

  Strips(const DoraScale& params, const Card& card) {
    using Kernel = ScaleColumnsBackward<bf16, true>;
    const int64_t least = ceil_div(params.m, Kernel::kRowsOfBlock);
    const int splits = splits_for(ceil_div(params.n, kWarp * Kernel::kWidth), least, card);
    rows = std::max<int64_t>(ceil_div(least, splits), 1) * Kernel::kRowsOfBlock;
    count = static_cast<int>(std::max<int64_t>(ceil_div(params.m, rows), 1));
  }
};

template <class T, bool kVector>
void scale_columns_backward(const DoraScale& params, const void* dy, void* dz, const Strips& strips,
                            float* d_scale, Stream stream) {
  using Kernel = ScaleColumnsBackward<T, kVector>;
  using Elements = typename Kernel::Elements;
  const int64_t width = params.n / Kernel::kWidth, column_blocks = ceil_div(width, kWarp);
  launch<Kernel>(
      {static_cast<const Elements*>(dy), static_cast<const Elements*>(params.z), params.scale, params.bias,
       params.m, width, column_blocks, strips.rows, static_cast<Elements*>(dz), d_scale},
      column_blocks * strips.count, stream, sizeof(typename Kernel::Shared));
}

}  // namespace

void dora_scale(const DoraScale& params, void* y, Stream stream) {
  with_type(params.dtype, [&](auto type) {
    using T = decltype(type);
    has_vectors<T>(params, nullptr, y) ? scale_columns<T, true>(params, y, stream)
                                       : scale_columns<T, false>(params, y, stream);
  });
}

void dora_scale_backward(const DoraScale& params, const void* dy, void* dz, float* d_scale,
                         Context& context) {
  const Strips strips(params, context.card);
  sum_splits(strips.count, params.n, d_scale, context, [&](float* sums) {
    with_type(params.dtype, [&](auto type) {
      using T = decltype(type);
      has_vectors<T>(params, dy, dz)
          ? scale_columns_backward<T, true>(params, dy, dz, strips, sums, context.stream)
          : scale_columns_backward<T, false>(params, dy, dz, strips, sums, context.stream);
    });
  });
}

}  // namespace peft_kernels::cuda
