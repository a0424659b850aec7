// Launches Dropout4.
#include "../core/launch.cuh"
#include "dropout.cuh"

namespace peft_kernels::cuda {
namespace {

template <class T, bool kVector>
void run(const void* x, int64_t numel, int64_t first, const DropoutMask& mask, void* out, Stream stream) {
  using Kernel = Dropout4<T, kVector>;
  if (numel == 0) return;
  const int64_t end = first + numel;
  const int64_t blocks = ceil_div(end, Kernel::kElements) - first / Kernel::kElements;
  launch<Kernel>({static_cast<const T*>(x), static_cast<T*>(out), first, end, mask},
                 ceil_div(blocks, Kernel::kThreads), stream);
}

}  // namespace

void dropout(const void* x, DType dtype, int64_t numel, int64_t first, const DropoutMask& mask, void* out,
             Stream stream) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    constexpr uintptr_t kBytes = 4 * sizeof(T);
    const bool vectors = first % 4 == 0 && are_aligned({x, out}, kBytes);
    vectors ? run<T, true>(x, numel, first, mask, out, stream)
            : run<T, false>(x, numel, first, mask, out, stream);
  });
}

}  // namespace peft_kernels::cuda
