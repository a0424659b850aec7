#include <vector>

#include "lora_launch.h"
#include "lora_over_rows.cuh"

namespace peft_kernels::cuda {
namespace {

using Any = LoraOverRows<bf16, true>;

// One kind of gradient of all adapters, dA or dB.
struct Gradients {
  const LoraBatch& batch;
  void* const* out;  // by adapter, or null
  bool is_b;
  const float* factors;  // dh, or h

  bool wants(int i) const { return out[i] != nullptr; }
  bool is_f32(int i) const {
    return (is_b ? batch.adapter[i].b_dtype : batch.adapter[i].a_dtype) == DType::kF32;
  }
};

struct Activations {
  const void* rows;
  int64_t features;
};

int64_t features_of(const Gradients& gradients, const Activations* x, int i) {
  return x[gradients.is_b ? gradients.batch.adapter[i].layer : 0].features;
}

// Does not depend on which gradients are wanted: they are to be the same to the bit.
int splits_of(const Gradients& gradients, const Activations* x, const Card& card) {
  int64_t blocks = 0;
  for (int i = 0; i < gradients.batch.adapters; ++i) {
    blocks += ceil_div(tiles_of(gradients.batch.adapter[i].rank), Any::kTiles) *
              ceil_div(features_of(gradients, x, i), Any::kFeatures);
  }
  // Two times 16 rows for each warp, or more.
  return splits_for(blocks, ceil_div(gradients.batch.m, 2 * Any::kRows * Any::kWarps), card,
                    Any::kBlocksPerSm);
}

struct Plan {
  int64_t count = 0;  // elements of the gradients
  int splits;

  Plan(const Gradients& gradients, const Activations* x, const Card& card)
      : splits(splits_of(gradients, x, card)) {
    for (int i = 0; i < gradients.batch.adapters; ++i) {
      if (gradients.wants(i)) count += gradients.batch.adapter[i].rank * features_of(gradients, x, i);
    }
  }
  int64_t workspace() const { return splits * count * int64_t{sizeof(float)}; }
};

void append_tiles(const Gradients& gradients, int i, int64_t features, int64_t begin,
                  std::vector<GradientTile>& tiles) {
  const AdapterView& adapter = gradients.batch.adapter[i];
  for (int rank = 0; rank < adapter.rank; rank += 8) {
    GradientTile tile{};
    tile.rank_stride = gradients.is_b ? 1 : features;
    tile.feature_stride = gradients.is_b ? adapter.rank : 1;
    tile.begin = begin + rank * tile.rank_stride;
    tile.group = adapter.group;
    if (!gradients.is_b) tile.mask = adapter.mask;
    tile.scale = gradients.is_b ? adapter.scaling : adapter.mask.scale;
    tile.column = static_cast<int>(adapter.h_begin + rank);
    tile.ranks = std::min(adapter.rank - rank, 8);
    tiles.push_back(tile);
  }
}

template <class Kernel>
Status run(const Gradients& gradients, const Activations& x, const std::vector<GradientTile>& tiles,
           const Plan& plan, float* partial, Stream stream) {
  typename Kernel::Params params{};
  params.x = static_cast<decltype(params.x)>(x.rows);
  params.m = gradients.batch.m;
  params.features = x.features;
  params.row_group = gradients.batch.row_group;
  params.factors = gradients.factors;
  params.ld = gradients.batch.ranks;
  params.partial = partial;
  params.count = plan.count;
  params.feature_blocks = ceil_div(x.features, Kernel::kFeatures);
  params.splits = plan.splits;
  for (size_t begin = 0; begin < tiles.size(); begin += Kernel::kMaxTiles) {
    params.tiles = static_cast<int>(std::min<size_t>(tiles.size() - begin, Kernel::kMaxTiles));
    std::copy_n(tiles.begin() + static_cast<int64_t>(begin), params.tiles, params.tile);
    const int64_t blocks = ceil_div(params.tiles, Kernel::kTiles) * params.feature_blocks * plan.splits;
    const Status status = launch<Kernel>(params, blocks, stream, sizeof(typename Kernel::Shared));
    if (status != 0) return status;
  }
  return 0;
}

// `begin` of each gradient in `partial` is the sum of the sizes of those before it.
template <class T>
Status sum_gradients(const Gradients& gradients, const Activations* x, const Plan& plan, const float* partial,
                     Stream stream) {
  using Kernel = SumGradients<T>;
  typename Kernel::Params params{};
  params.partial = partial;
  params.splits = plan.splits;
  params.split_stride = plan.count;
  for (int i = 0; i < gradients.batch.adapters; ++i) {
    if (gradients.wants(i)) {
      params.part[params.parts++] = {params.count, gradients.out[i], gradients.is_f32(i)};
      params.count += gradients.batch.adapter[i].rank * features_of(gradients, x, i);
    }
    if (params.parts == Kernel::kMaxParts || i + 1 == gradients.batch.adapters) {
      const Status status = launch<Kernel>(params, ceil_div(params.count, Kernel::kThreads), stream);
      if (status != 0) return status;
      params.partial += params.count;
      params.count = 0;
      params.parts = 0;
    }
  }
  return 0;
}

// `x` by layer for dB, the one x for dA.
Status over_rows(const Gradients& gradients, const Activations* x, int count, const Card& card,
                 void* workspace, Stream stream) {
  const Plan plan(gradients, x, card);
  auto* partial = static_cast<float*>(workspace);
  return with_half(gradients.batch.dtype, [&](auto type) {
    using T = decltype(type);
    for (int j = 0; j < count; ++j) {
      std::vector<GradientTile> tiles;
      int64_t begin = 0;
      for (int i = 0; i < gradients.batch.adapters; ++i) {
        if (!gradients.wants(i)) continue;
        const bool here = !gradients.is_b || gradients.batch.adapter[i].layer == j;
        if (here) append_tiles(gradients, i, x[j].features, begin, tiles);
        begin += gradients.batch.adapter[i].rank * features_of(gradients, x, i);
      }
      const bool vectors = has_vectors(x[j].rows, x[j].features);
      const Status status = vectors
                                ? run<LoraOverRows<T, true>>(gradients, x[j], tiles, plan, partial, stream)
                                : run<LoraOverRows<T, false>>(gradients, x[j], tiles, plan, partial, stream);
      if (status != 0) return status;
    }
    return sum_gradients<T>(gradients, x, plan, partial, stream);
  });
}

std::vector<Activations> by_layer(const LayerGradient* layer, int layers) {
  std::vector<Activations> x;
  for (int j = 0; j < layers; ++j) x.push_back({layer[j].dy, layer[j].n});
  return x;
}

}  // namespace

int64_t lora_da_workspace(const LoraBatch& batch, void* const* da, const Card& card) {
  const Activations x{nullptr, batch.k};
  return Plan({batch, da, false, nullptr}, &x, card).workspace();
}

Status lora_da(const LoraBatch& batch, const void* x, const float* dh, void* const* da, const Card& card,
               void* workspace, Stream stream) {
  const Activations rows{x, batch.k};
  return over_rows({batch, da, false, dh}, &rows, 1, card, workspace, stream);
}

int64_t lora_db_workspace(const LoraBatch& batch, const LayerGradient* layer, int layers, void* const* db,
                          const Card& card) {
  return Plan({batch, db, true, nullptr}, by_layer(layer, layers).data(), card).workspace();
}

Status lora_db(const LoraBatch& batch, const LayerGradient* layer, int layers, const float* h,
               void* const* db, const Card& card, void* workspace, Stream stream) {
  const std::vector<Activations> rows = by_layer(layer, layers);
  return over_rows({batch, db, true, h}, rows.data(), layers, card, workspace, stream);
}

}  // namespace peft_kernels::cuda
