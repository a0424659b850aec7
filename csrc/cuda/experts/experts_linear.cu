// Launches ExpertsTiles: the grouped GEMM y = x W^T of experts.
#include "../linear/linear_tiles.cuh"
#include "experts_launch.cuh"

namespace peft_kernels::cuda {
namespace {

TileShape shape_for(const Card& card) { return {TileShape::kWarps, has_wide_table(card)}; }

}  // namespace

int experts_tile_rows(DType dtype, int64_t experts, int64_t rows, int64_t n, int64_t k, int block_shift,
                      const Card& card) {
  // Any number of rows will do: the conditions on one expert do not depend on it.
  if (!plan_linear(false, dtype, TileShape::kTokens, n, k, block_shift, card, Kernels::kMmaSync).has_kernel())
    return 0;
  const TileShape shape = shape_for(card);
  const int64_t tiles = ceil_div(n, shape.rows()) * ExpertRows::most_tiles(experts, rows, TileShape::kTokens);
  return counts_fit(tiles * ceil_div(k, shape.depth()), experts, n, k, card) ? TileShape::kTokens : 0;
}

void experts_linear(const ExpertsParams& params, Context& context) {
  const TileShape shape = shape_for(context.card);
  const ShareParams work = shares(ceil_div(params.linear.n, shape.rows()) * params.rows.max_tiles,
                                  shape.rows() * TileShape::kTokens, context);
  with_operands(params.linear.dtype, shape.wide_table, [&](auto type, auto table) {
    launch<ExpertsTiles<decltype(type), decltype(table)>>(
        many_weights(params, work), context.card.sms, context.stream,
        shape.wide_table ? kBehindWideTable : kNarrowTableBytes + shape.fixed_bytes());
  });
}

}  // namespace peft_kernels::cuda
