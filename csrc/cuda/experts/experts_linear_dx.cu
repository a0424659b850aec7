// Launches ExpertsDx: the grouped GEMM dx = dY W of experts.
#include "../linear/linear_dx.cuh"
#include "experts_launch.cuh"

namespace peft_kernels::cuda {
namespace {

// Smaller tiles if experts have few rows on average, or if there is no space for large ones.
DxShape shape_for(int64_t experts, int64_t rows, const Card& card) {
  constexpr DxShape kSmall{4, false}, kLarge{6, false};
  return rows <= experts * kSmall.tokens() || !has_wide_table(card) ? kSmall : kLarge;
}

template <class Kernel>
void run(const ExpertsParams& params, const ShareParams& work, const Cut& cut, const Context& context) {
  launch<Kernel>({many_weights(params, work), cut.shared_offset, cut.x_offset}, context.card.sms,
                 context.stream, static_cast<int>(cut.shared_bytes));
}

}  // namespace

int experts_dx_tile_rows(DType dtype, int64_t experts, int64_t rows, int64_t n, int64_t k, int block_shift,
                         const Card& card) {
  const DxShape shape = shape_for(experts, rows, card);
  if (!plan_linear(true, dtype, shape.tokens(), n, k, block_shift, card, Kernels::kMmaSync).has_kernel())
    return 0;
  const int64_t tiles =
      ceil_div(k, DxShape::kColumns) * ExpertRows::most_tiles(experts, rows, shape.tokens());
  return counts_fit(tiles * 2 * ceil_div(n, DxShape::kRows), experts, n, k, card) ? shape.tokens() : 0;
}

void experts_linear_dx(const ExpertsParams& params, Context& context) {
  const DxShape shape = shape_for(params.rows.experts, params.rows.rows, context.card);
  const Cut cut = shape.cut(shape.tokens(), params.linear.n, params.linear.k, context.card);
  const ShareParams work = shares(ceil_div(params.linear.k, DxShape::kColumns) * params.rows.max_tiles,
                                  shape.tokens() * DxShape::kColumns, context);
  with_half(params.linear.dtype, [&](auto type) {
    using T = decltype(type);
    shape.token_tiles == 4 ? run<ExpertsDx<T, 4>>(params, work, cut, context)
                           : run<ExpertsDx<T, 6>>(params, work, cut, context);
  });
}

}  // namespace peft_kernels::cuda
