// Launches QuantizeNf4 and QuantizeAbsmax.
#include "../core/launch.cuh"
#include "nf4.h"
#include "nf4_quantize.cuh"

namespace peft_kernels::cuda {

void quantize_nf4(const void* weight, DType dtype, int64_t numel, int block_shift, uint8_t* packed,
                  float* absmax, Stream stream) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    using Kernel = QuantizeNf4<T>;
    launch<Kernel>({static_cast<const T*>(weight), are_aligned({weight}), numel, block_shift, packed, absmax},
                   ceil_div(numel, Kernel::kThreads * Kernel::kRun), stream, sizeof(typename Kernel::Shared));
  });
}

void quantize_absmax(const float* absmax, int64_t blocks, const float* offset, uint8_t* q8, float* absmax2,
                     Stream stream) {
  launch<QuantizeAbsmax>({absmax, blocks, offset, q8, absmax2}, ceil_div(blocks, nf4::kAbsmaxBlock), stream,
                         sizeof(QuantizeAbsmax::Shared));
}

}  // namespace peft_kernels::cuda
