// Launches RotaryHalves.
#include <climits>

#include "../core/launch.cuh"
#include "rotary.cuh"

namespace peft_kernels::cuda {
namespace {

template <class T, class Angle, int kWidth>
void start(const Rotary& params, Stream stream) {
  using Kernel = RotaryHalves<T, Angle, kWidth>;
  const int half = static_cast<int>(params.features / 2);
  for (int64_t first = 0; first < params.count; first += Kernel::kMostTensors) {
    typename Kernel::Params p{
        {}, params.rows, half, params.cos, params.sin, params.inverse, params.out_dtype};
    int64_t blocks = 0;
    for (int64_t i = 0; i < Kernel::kMostTensors; ++i) {
      p.tensors[i].first_block = INT_MAX;
      const RotaryHeads* heads = params.heads + first + i;
      if (first + i >= params.count || heads->heads * half == 0) continue;
      const int64_t parts = ceil_div(heads->heads, Kernel::kHeads);
      const int64_t rows = ceil_div(Kernel::kThreads, parts * (half / kWidth));
      const int64_t row_blocks = ceil_div(params.rows, rows);
      p.tensors[i] = {*heads, static_cast<int>(blocks), static_cast<int>(row_blocks), static_cast<int>(rows),
                      static_cast<int>(parts)};
      blocks += params.sequences * row_blocks;
    }
    launch<Kernel>(p, blocks, stream);
  }
}

// Whether all heads, of x and of the angles, start at vectors of 16 bytes.
template <class T>
bool has_vectors(const Rotary& params) {
  constexpr int64_t kWidth = 16 / sizeof(T);
  const RotaryAngles &cos = params.cos, &sin = params.sin;
  int64_t strides = params.features / 2 | cos.sequence | cos.row | sin.sequence | sin.row;
  bool aligned = are_aligned({cos.of, sin.of});
  for (int64_t i = 0; i < params.count; ++i) {
    const RotaryHeads& heads = params.heads[i];
    strides |= heads.sequence | heads.row | heads.head;
    aligned = aligned && are_aligned({heads.x, heads.out});
  }
  return aligned && strides % kWidth == 0;
}

template <class T, class Angle>
void start_with(const Rotary& params, Stream stream) {
  has_vectors<T>(params) ? start<T, Angle, 16 / sizeof(T)>(params, stream)
                         : start<T, Angle, 1>(params, stream);
}

}  // namespace

void rotary(const Rotary& params, Stream stream) {
  with_type(params.dtype, [&](auto type) {
    using T = decltype(type);
    params.angle_dtype == DType::kF32 ? start_with<T, float>(params, stream)
                                      : start_with<T, T>(params, stream);
  });
}

}  // namespace peft_kernels::cuda
