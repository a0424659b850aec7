// Launches LinearWgmma and LinearWgmmaDx. Compiled for sm_90a alone, separately from the other
// files (setup.py).
#include "linear_wgmma_launch.cuh"

namespace peft_kernels::cuda {
namespace {

template <class T, int kTokens>
void run(const WgmmaShape& shape, const WgmmaParams<OneWeight>& params, const Cut& cut, Context& context) {
  const auto shared_bytes = static_cast<int>(cut.shared_bytes);
  shape.is_dx ? launch<LinearWgmmaDx<T, kTokens>>(params, cut.blocks, context.stream, shared_bytes)
              : launch<LinearWgmma<T, kTokens>>(params, cut.blocks, context.stream, shared_bytes);
}

}  // namespace

void start_kernel(const WgmmaShape& shape, const Cut& cut, const LinearParams& params, Context& context) {
  WgmmaParams<OneWeight> all{};
  static_cast<LinearParams&>(all) = params;
  all.work = share_params(cut, context);
  map_operands(shape, 1, params, all);
  if (params.slab.depth > 0) {
    map_matrix(params.slab.u, 2, params.m, params.slab.depth, shape.tokens, WgmmaShape::kDepth, all.u_map);
  }
  with_half(params.dtype, [&](auto type) {
    using T = decltype(type);
    switch (shape.tokens) {
      case 64:
        return run<T, 64>(shape, all, cut, context);
      case 128:
        return run<T, 128>(shape, all, cut, context);
      default:
        return run<T, 256>(shape, all, cut, context);
    }
  });
}

}  // namespace peft_kernels::cuda
