// Launches ExpertsWgmma and ExpertsWgmmaDx: the grouped GEMMs of experts for compute capability 9.0. Compiled
// for sm_90a alone, separately from the other files (setup.py).
#include "../linear/linear_wgmma_launch.cuh"
#include "experts_launch.cuh"

namespace peft_kernels::cuda {
namespace {

template <class T, int kTokens>
void run(bool is_dx, const WgmmaParams<ManyWeights>& params, const Context& context) {
  constexpr int kSharedBytes = WgmmaShape{kTokens}.end();
  is_dx ? launch<ExpertsWgmmaDx<T, kTokens>>(params, context.card.sms, context.stream, kSharedBytes)
        : launch<ExpertsWgmma<T, kTokens>>(params, context.card.sms, context.stream, kSharedBytes);
}

}  // namespace

void experts_wgmma(bool is_dx, const ExpertsParams& params, Context& context) {
  const LinearParams& linear = params.linear;
  const WgmmaShape shape{params.rows.tile_rows, is_dx};
  const int64_t feature_tiles = ceil_div(is_dx ? linear.k : linear.n, WgmmaShape::kFeatures);
  WgmmaParams<ManyWeights> all{};
  static_cast<ManyWeights::Params&>(all) = many_weights(
      params,
      shares(feature_tiles * params.rows.max_tiles, int64_t{WgmmaShape::kFeatures} * shape.tokens, context));
  map_operands(shape, params.rows.experts, linear, all);
  with_half(linear.dtype, [&](auto type) {
    using T = decltype(type);
    shape.tokens == 64 ? run<T, 64>(is_dx, all, context) : run<T, 128>(is_dx, all, context);
  });
}

}  // namespace peft_kernels::cuda
