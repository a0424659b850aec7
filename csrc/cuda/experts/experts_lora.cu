// Launches ExpertsShrink, ExpertsOverRows and ExpertsExpand: the ranks, gradients and deltas of experts'
// adapters.
#include "../lora/lora_expand.cuh"
#include "../lora/lora_over_rows.cuh"
#include "../lora/lora_shrink.cuh"
#include "experts.h"

namespace peft_kernels::cuda {
namespace {

// A tile of ranks; the kernels add the expert's offset.
RankTile rank_tile_of(int first, int rank, float scale) {
  return {0, DropoutMask{}, scale, first, std::min(rank - first, kTileRanks)};
}

template <class Kernel>
void shrink(const ExpertRows& rows, const void* x, int64_t features, const ExpertsFactor& factor,
            bool transposed, float scale, float* out, Context& context) {
  typename Kernel::Params params{};
  params.x = static_cast<decltype(params.x)>(x);
  params.m = rows.rows;
  params.features = features;
  params.out = out;
  params.out_ld = factor.rank;
  params.row_blocks = rows.max_tiles;
  params.row_warps = 1;
  while (params.row_warps * Kernel::kRows < rows.tile_rows) params.row_warps *= 2;
  params.experts = rows;
  params.factor_stride = factor.rank * features;
  // At least two windows of features per warp.
  const int64_t slices = ceil_div(features, 2 * kWindow * (Kernel::kWarps / params.row_warps));
  const int64_t chunks = ceil_div(ceil_div(factor.rank, kTileRanks), Kernel::kTiles);
  params.splits = splits_for(params.row_blocks * chunks, slices, context.card);
  if (params.splits > 1) {
    const int64_t sums = params.m * params.out_ld * params.splits;
    params.partial = static_cast<float*>(context.workspace(sums * int64_t{sizeof(float)}));
    params.counter = context.counters(params.row_blocks * ceil_div(Kernel::kMaxTiles, Kernel::kTiles));
  }
  std::vector<ShrinkTile> tiles;
  for (int first = 0; first < factor.rank; first += kTileRanks) {
    const int64_t begin = transposed ? first : first * features;
    tiles.push_back({rank_tile_of(first, factor.rank, scale),
                     static_cast<const char*>(factor.data) + begin * (factor.is_f32 ? 4 : 2),
                     transposed ? factor.rank : features, factor.is_f32});
  }
  launch_by_tiles<Kernel>(params, tiles, params.row_blocks * params.splits, context.stream);
}

template <class Kernel>
void over_rows(const ExpertRows& rows, const void* x, int64_t features, const float* ranks, int rank,
               bool transposed, float scale, void* out, bool is_f32, Stream stream) {
  typename Kernel::Params params{};
  params.x = static_cast<decltype(params.x)>(x);
  params.features = features;
  params.factors = ranks;
  params.ld = rank;
  params.feature_blocks = ceil_div(features, Kernel::kFeatures);
  params.splits = 1;
  params.experts = rows;
  params.out_stride = rank * features;
  std::vector<GradientTile> tiles;
  for (int first = 0; first < rank; first += kTileRanks) {
    const int64_t rank_stride = transposed ? 1 : features;
    tiles.push_back({rank_tile_of(first, rank, scale),
                     static_cast<char*>(out) + first * rank_stride * (is_f32 ? 4 : 2), 0, rank_stride,
                     transposed ? rank : 1, is_f32});
  }
  launch_by_tiles<Kernel>(params, tiles, params.feature_blocks * rows.experts, stream);
}

}  // namespace

void experts_ranks(const ExpertRows& rows, DType dtype, const void* x, int64_t features,
                   const ExpertsFactor& factor, bool transposed, float scale, float* out, Context& context) {
  with_half(dtype, [&](auto type) {
    using T = decltype(type);
    (transposed ? shrink<ExpertsShrink<T, true>> : shrink<ExpertsShrink<T, false>>)(rows, x, features, factor,
                                                                                    transposed, scale, out,
                                                                                    context);
  });
}

void experts_gradient(const ExpertRows& rows, DType dtype, const void* x, int64_t features,
                      const float* ranks, int rank, bool transposed, float scale, void* out, bool is_f32,
                      Stream stream) {
  with_half(dtype, [&](auto type) {
    over_rows<ExpertsOverRows<decltype(type)>>(rows, x, features, ranks, rank, transposed, scale, out, is_f32,
                                               stream);
  });
}

void experts_expand(const ExpertRows& rows, const ExpertsColumns& columns, Stream stream) {
  using Kernel = ExpertsExpand;
  const ExpertsDelta& delta = columns.delta;
  const int64_t rank_stride = columns.is_dx ? columns.features : 1;
  const int64_t feature_stride = columns.is_dx ? 1 : delta.rank;
  typename Kernel::Params params{};
  params.out = static_cast<bf16*>(columns.out) + columns.begin;
  params.out_ld = columns.features;
  params.features = columns.count;
  params.ranks = delta.ranks;
  params.ld = delta.rank;
  params.feature_blocks = ceil_div(columns.count, Kernel::kWarps * Kernel::kFeatures);
  params.terms = 1;
  params.term[0] = static_cast<const bf16*>(columns.product);
  Delta& own = params.delta[0];
  own.factor = {
      static_cast<const char*>(delta.factor) + columns.begin * feature_stride * (delta.is_f32 ? 4 : 2),
      rank_stride, feature_stride, delta.is_f32};
  own.bias = columns.bias == nullptr ? nullptr : columns.bias + columns.begin;
  own.scale = delta.scale;
  own.rank = delta.rank;
  params.experts = rows;
  params.factor_stride = delta.rank * columns.features;
  params.bias_stride = columns.features;
  launch<Kernel>(params, rows.max_tiles * params.feature_blocks, stream);
}

}  // namespace peft_kernels::cuda
