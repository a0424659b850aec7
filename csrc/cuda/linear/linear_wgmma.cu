// Launches LinearWgmma and LinearWgmmaDx. Compiled for sm_90a alone (setup.py), beside the other files.
#include "../hopper/tensor_map.h"
#include "linear_wgmma.cuh"

namespace peft_kernels::cuda {
namespace {

template <class T, int kTokens>
void run(const WgmmaShape& shape, const WgmmaParams& params, const Cut& cut, Context& context) {
  const auto shared_bytes = static_cast<int>(cut.shared_bytes);
  shape.is_dx ? launch<LinearWgmmaDx<T, kTokens>>(params, cut.blocks, context.stream, shared_bytes)
              : launch<LinearWgmma<T, kTokens>>(params, cut.blocks, context.stream, shared_bytes);
}

}  // namespace

void start_kernel(const WgmmaShape& shape, const Cut& cut, const LinearParams& params, Context& context) {
  const int terms = shape.is_dx ? params.n : params.k;
  WgmmaParams all{};
  static_cast<LinearParams&>(all) = params;
  all.work = share_params(cut, context);
  // Codes of a stage: 128 rows of 64 columns, or 64 rows of 128.
  const int rows = shape.is_dx ? WgmmaShape::kDepth : WgmmaShape::kFeatures;
  const int bytes = WgmmaShape::kWeightBytes / rows;
  map_matrix(params.weight.packed, 1, params.n, params.k / 2, rows, bytes, all.weight_map);
  map_matrix(params.x, 2, params.m, terms, shape.tokens, WgmmaShape::kDepth, all.x_map);
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
