#include <vector>

#include "lora_launch.h"
#include "lora_shrink.cuh"
#include "sum_splits.cuh"

namespace peft_kernels::cuda {
namespace {

using Any = LoraShrink<bf16, true, false>;

struct Plan {
  int row_warps;
  int64_t row_blocks;
  int splits;

  Plan(int64_t m, int64_t features, int64_t tiles, const Card& card) : row_warps(1) {
    while (row_warps < Any::kWarps && row_warps * Any::kRows < m) row_warps *= 2;
    row_blocks = ceil_div(m, row_warps * Any::kRows);
    // Two windows of features for each warp, or more.
    const int64_t slices = ceil_div(features, 2 * Any::kWindow * (Any::kWarps / row_warps));
    splits = splits_for(row_blocks * ceil_div(tiles, Any::kTiles), slices, card);
  }
};

Plan plan_h(const LoraBatch& batch, const Card& card) {
  int64_t tiles = 0;
  for (int i = 0; i < batch.adapters; ++i) tiles += tiles_of(batch.adapter[i].rank);
  return {batch.m, batch.k, tiles, card};
}

// One for all layers.
Plan plan_dh(const LoraBatch& batch, const LayerGradient* layer, int layers, const Card& card) {
  int64_t tiles = 0, n = 0;
  for (int i = 0; i < batch.adapters; ++i) tiles += tiles_of(batch.adapter[i].rank);
  for (int j = 0; j < layers; ++j) n = std::max(n, layer[j].n);
  return {batch.m, n, std::max<int64_t>(tiles / std::max(layers, 1), 1), card};
}

int64_t workspace_of(const Plan& plan, const LoraBatch& batch) {
  return plan.splits > 1 ? plan.splits * batch.m * batch.ranks * int64_t{sizeof(float)} : 0;
}

template <bool kTransposed>
std::vector<RankTile> tiles_of(const AdapterView& adapter, int64_t features) {
  const bool is_f32 = (kTransposed ? adapter.b_dtype : adapter.a_dtype) == DType::kF32;
  const char* factor = static_cast<const char*>(kTransposed ? adapter.b : adapter.a);
  std::vector<RankTile> tiles;
  for (int rank = 0; rank < adapter.rank; rank += 8) {
    RankTile tile{};
    tile.factor = factor + rank * (kTransposed ? 1 : features) * (is_f32 ? 4 : 2);
    tile.ld = kTransposed ? adapter.rank : features;
    tile.group = adapter.group;
    if (!kTransposed) tile.mask = adapter.mask;
    tile.scale = kTransposed ? adapter.scaling : adapter.mask.scale;
    tile.column = static_cast<int>(adapter.h_begin + rank);
    tile.ranks = std::min(adapter.rank - rank, 8);
    tile.is_f32 = is_f32;
    tiles.push_back(tile);
  }
  return tiles;
}

template <class Kernel>
Status run(const LoraBatch& batch, const void* x, int64_t features, const std::vector<RankTile>& tiles,
           const Plan& plan, float* out, Stream stream) {
  typename Kernel::Params params{};
  params.x = static_cast<decltype(params.x)>(x);
  params.m = batch.m;
  params.features = features;
  params.row_group = batch.row_group;
  params.out = out;
  params.out_ld = batch.ranks;
  params.row_blocks = plan.row_blocks;
  params.splits = plan.splits;
  params.row_warps = plan.row_warps;
  for (size_t begin = 0; begin < tiles.size(); begin += Kernel::kMaxTiles) {
    params.tiles = static_cast<int>(std::min<size_t>(tiles.size() - begin, Kernel::kMaxTiles));
    std::copy_n(tiles.begin() + static_cast<int64_t>(begin), params.tiles, params.tile);
    const int64_t blocks = plan.row_blocks * plan.splits * ceil_div(params.tiles, Kernel::kTiles);
    const Status status = launch<Kernel>(params, blocks, stream, sizeof(typename Kernel::Shared));
    if (status != 0) return status;
  }
  return 0;
}

// The tiles' columns of out, or of each split's part.
template <bool kTransposed>
Status shrink(const LoraBatch& batch, const void* x, int64_t features, const std::vector<RankTile>& tiles,
              const Plan& plan, float* out, Stream stream) {
  bool vectors = has_vectors(x, features);
  if (!kTransposed) {
    for (const RankTile& tile : tiles) vectors = vectors && has_vectors(tile.factor, features);
  }
  return with_half(batch.dtype, [&](auto type) {
    using T = decltype(type);
    return vectors ? run<LoraShrink<T, true, kTransposed>>(batch, x, features, tiles, plan, out, stream)
                   : run<LoraShrink<T, false, kTransposed>>(batch, x, features, tiles, plan, out, stream);
  });
}

Status sum_splits(const LoraBatch& batch, const Plan& plan, const float* partial, float* out, Stream stream) {
  if (plan.splits == 1) return 0;
  const int64_t count = batch.m * batch.ranks;
  return launch<SumSplits>({partial, plan.splits, count, out}, ceil_div(count, SumSplits::kThreads), stream);
}

}  // namespace

int64_t lora_h_workspace(const LoraBatch& batch, const Card& card) {
  return workspace_of(plan_h(batch, card), batch);
}

Status lora_h(const LoraBatch& batch, const void* x, float* h, const Card& card, void* workspace,
              Stream stream) {
  const Plan plan = plan_h(batch, card);
  float* out = plan.splits > 1 ? static_cast<float*>(workspace) : h;
  std::vector<RankTile> tiles;
  for (int i = 0; i < batch.adapters; ++i) {
    const std::vector<RankTile> own = tiles_of<false>(batch.adapter[i], batch.k);
    tiles.insert(tiles.end(), own.begin(), own.end());
  }
  const Status status = shrink<false>(batch, x, batch.k, tiles, plan, out, stream);
  return status != 0 ? status : sum_splits(batch, plan, out, h, stream);
}

int64_t lora_dh_workspace(const LoraBatch& batch, const LayerGradient* layer, int layers, const Card& card) {
  return workspace_of(plan_dh(batch, layer, layers, card), batch);
}

Status lora_dh(const LoraBatch& batch, const LayerGradient* layer, int layers, float* dh, const Card& card,
               void* workspace, Stream stream) {
  const Plan plan = plan_dh(batch, layer, layers, card);
  float* out = plan.splits > 1 ? static_cast<float*>(workspace) : dh;
  for (int j = 0; j < layers; ++j) {
    std::vector<RankTile> tiles;
    for (int i = 0; i < batch.adapters; ++i) {
      if (batch.adapter[i].layer != j) continue;
      const std::vector<RankTile> own = tiles_of<true>(batch.adapter[i], layer[j].n);
      tiles.insert(tiles.end(), own.begin(), own.end());
    }
    const Status status = shrink<true>(batch, layer[j].dy, layer[j].n, tiles, plan, out, stream);
    if (status != 0) return status;
  }
  return sum_splits(batch, plan, out, dh, stream);
}

}  // namespace peft_kernels::cuda
