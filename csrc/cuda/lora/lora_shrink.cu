// Launches LoraShrink: h = mask(x) A^T and dh = scaling dY B.
#include "../core/launch.cuh"
#include "lora_shrink.cuh"

namespace peft_kernels::cuda {
namespace {

using Any = LoraShrink<bf16, true, false>;

// The launch configuration, the same for all layers.
struct Plan {
  int row_warps = 1;
  int64_t row_blocks;
  int splits;

  Plan(const LoraBatch& batch, const std::vector<Activations>& layers, const Card& card) {
    int64_t tiles = 0, features = 0;
    for (const AdapterView& adapter : batch.adapters) tiles += ceil_div(adapter.rank, kTileRanks);
    for (const Activations& x : layers) features = std::max(features, x.features);
    tiles = std::max<int64_t>(tiles / std::max<int64_t>(static_cast<int64_t>(layers.size()), 1), 1);
    while (row_warps < Any::kWarps && row_warps * Any::kRows < batch.m) row_warps *= 2;
    row_blocks = ceil_div(batch.m, row_warps * Any::kRows);
    // At least two windows of features per warp.
    const int64_t slices = ceil_div(features, 2 * kWindow * (Any::kWarps / row_warps));
    splits = splits_for(row_blocks * ceil_div(tiles, Any::kTiles), slices, card);
  }
};

// Appends the tiles of an adapter: of A, or of B, which is transposed.
template <bool kTransposed>
void append_tiles(const AdapterView& adapter, int64_t features, std::vector<ShrinkTile>& tiles) {
  const bool is_f32 = (kTransposed ? adapter.b_dtype : adapter.a_dtype) == DType::kF32;
  const char* factor = static_cast<const char*>(kTransposed ? adapter.b : adapter.a);
  for (int rank = 0; rank < adapter.rank; rank += kTileRanks) {
    tiles.push_back({rank_tile(adapter, rank, kTransposed),
                     factor + rank * (kTransposed ? 1 : features) * (is_f32 ? 4 : 2),
                     kTransposed ? adapter.rank : features, is_f32});
  }
}

template <class Kernel>
void run(const LoraBatch& batch, const Activations& x, const std::vector<ShrinkTile>& tiles, const Plan& plan,
         float* out, float* partial, uint32_t* counter, Stream stream) {
  typename Kernel::Params params{};
  params.x = static_cast<decltype(params.x)>(x.rows);
  params.m = batch.m;
  params.features = x.features;
  params.row_group = batch.row_group;
  params.out = out;
  params.out_ld = batch.ranks;
  params.partial = partial;
  params.counter = counter;
  params.row_blocks = plan.row_blocks;
  params.splits = plan.splits;
  params.row_warps = plan.row_warps;
  launch_by_tiles<Kernel>(params, tiles, plan.row_blocks * plan.splits, stream);
}

// One launch per layer, or one for all adapters if they share a single input.
template <bool kTransposed>
void shrink(const LoraBatch& batch, const std::vector<Activations>& layers, float* out, Context& context) {
  const Plan plan(batch, layers, context.card);
  float* partial = nullptr;
  uint32_t* counter = nullptr;
  if (plan.splits > 1) {
    const int64_t sums = batch.m * batch.ranks * plan.splits;
    partial = static_cast<float*>(context.workspace(sums * int64_t{sizeof(float)}));
    counter = context.counters(plan.row_blocks * ceil_div(Any::kMaxTiles, Any::kTiles));
  }
  for (size_t j = 0; j < layers.size(); ++j) {
    std::vector<ShrinkTile> tiles;
    for (const AdapterView& adapter : batch.adapters) {
      if (kTransposed && adapter.layer != static_cast<int>(j)) continue;
      append_tiles<kTransposed>(adapter, layers[j].features, tiles);
    }
    bool vectors = has_vectors(layers[j].rows, layers[j].features);
    for (const ShrinkTile& tile : tiles) {
      vectors = vectors && (kTransposed || has_vectors(tile.factor, layers[j].features));
    }
    with_half(batch.dtype, [&](auto type) {
      using T = decltype(type);
      vectors ? run<LoraShrink<T, true, kTransposed>>(batch, layers[j], tiles, plan, out, partial, counter,
                                                      context.stream)
              : run<LoraShrink<T, false, kTransposed>>(batch, layers[j], tiles, plan, out, partial, counter,
                                                       context.stream);
    });
  }
}

}  // namespace

void lora_h(const LoraBatch& batch, const void* x, float* h, Context& context) {
  shrink<false>(batch, {{x, batch.k}}, h, context);
}

void lora_dh(const LoraBatch& batch, const std::vector<Activations>& dy, float* dh, Context& context) {
  shrink<true>(batch, dy, dh, context);
}

}  // namespace peft_kernels::cuda
