#include "../common/integers.h"
#include "kernels.h"
#include "launch.cuh"
#include "nf4_quantize.cuh"

namespace peft_kernels::cuda {
namespace {

template <class T>
Status launch_quantize(const void* weight, int64_t numel, int block_shift, uint8_t* packed, float* absmax,
                       Stream stream) {
  using Kernel = QuantizeNf4<T>;
  typename Kernel::Params params{
      static_cast<const T*>(weight), are_aligned({weight}), numel, block_shift, packed, absmax, {}};
  for (int i = 0; i + 1 < nf4::kCodes; ++i) params.thresholds[i] = nf4::kThresholds[i];
  return launch<Kernel>(params, ceil_div(numel, Kernel::kThreads * Kernel::kRun), stream,
                        sizeof(typename Kernel::Shared));
}

}  // namespace

Status quantize_nf4(const void* weight, DType dtype, int64_t numel, int block_shift, uint8_t* packed,
                    float* absmax, Stream stream) {
  return with_type(dtype, [&](auto type) {
    return launch_quantize<decltype(type)>(weight, numel, block_shift, packed, absmax, stream);
  });
}

Status quantize_absmax(const float* absmax, int64_t blocks, const float* offset, uint8_t* q8, float* absmax2,
                       Stream stream) {
  QuantizeAbsmax::Params params{absmax, blocks, offset, q8, absmax2, {}};
  for (int i = 0; i + 1 < nf4::kDynamicCodes; ++i) {
    params.midpoints[i] = (nf4::kDynamicMap[i] + nf4::kDynamicMap[i + 1]) * 0.5f;
  }
  return launch<QuantizeAbsmax>(params, ceil_div(blocks, nf4::kAbsmaxBlock), stream,
                                sizeof(QuantizeAbsmax::Shared));
}

}  // namespace peft_kernels::cuda
