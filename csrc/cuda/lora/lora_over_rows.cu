// Launches LoraOverRows: the gradients of A and B.
#include "lora_over_rows.cuh"

namespace peft_kernels::cuda {
namespace {

using Any = LoraOverRows<bf16, true>;

// The gradients of A (from x) or of B (from dY of each layer), of all adapters.
struct Gradients {
  const LoraBatch& batch;
  std::vector<Activations> rows;
  bool is_b;
  const float* factors;           // dh, or h
  const std::vector<void*>& out;  // per adapter; null: not needed

  const Activations& rows_of(const AdapterView& adapter) const { return rows[is_b ? adapter.layer : 0]; }
  int64_t size(const AdapterView& adapter) const { return adapter.rank * rows_of(adapter).features; }
  bool is_f32(const AdapterView& adapter) const {
    return (is_b ? adapter.b_dtype : adapter.a_dtype) == DType::kF32;
  }
};

// Independent of which gradients are needed, so that results are the same to the bit.
int splits_of(const Gradients& gradients, const Card& card) {
  int64_t blocks = 0;
  for (const AdapterView& adapter : gradients.batch.adapters) {
    blocks += ceil_div(ceil_div(adapter.rank, kTileRanks), Any::kTiles) *
              ceil_div(gradients.rows_of(adapter).features, Any::kFeatures);
  }
  // At least two times 16 rows per warp.
  return splits_for(blocks, ceil_div(gradients.batch.m, 2 * Any::kRows * Any::kWarps), card,
                    Any::kBlocksPerSm);
}

// Partial sums of all needed gradients, concatenated: [splits, count] floats, if there are splits.
struct Partial {
  float* sums = nullptr;
  uint32_t* counters = nullptr;
  int splits;
  int64_t count = 0;
  std::vector<int64_t> begin;  // per adapter; if not needed, that of the next one

  Partial(const Gradients& gradients, Context& context) : splits(splits_of(gradients, context.card)) {
    for (size_t i = 0; i < gradients.out.size(); ++i) {
      begin.push_back(count);
      if (gradients.out[i]) count += gradients.size(gradients.batch.adapters[i]);
    }
    if (splits == 1) return;
    sums = static_cast<float*>(context.workspace(splits * count * int64_t{sizeof(float)}));
    int64_t features = 0;
    for (const Activations& x : gradients.rows) features = std::max(features, x.features);
    counters = context.counters(ceil_div(features, Any::kFeatures) * ceil_div(Any::kMaxTiles, Any::kTiles));
  }
};

std::vector<GradientTile> tiles_of(const Gradients& gradients, const Activations& x, const Partial& partial) {
  std::vector<GradientTile> tiles;
  for (size_t i = 0; i < gradients.out.size(); ++i) {
    const AdapterView& adapter = gradients.batch.adapters[i];
    if (!gradients.out[i] || &gradients.rows_of(adapter) != &x) continue;
    const bool is_f32 = gradients.is_f32(adapter);
    const int64_t rank_stride = gradients.is_b ? 1 : x.features;
    for (int rank = 0; rank < adapter.rank; rank += kTileRanks) {
      const int64_t begin = rank * rank_stride;
      tiles.push_back({rank_tile(adapter, rank, gradients.is_b),
                       static_cast<char*>(gradients.out[i]) + begin * (is_f32 ? 4 : 2),
                       partial.begin[i] + begin, rank_stride, gradients.is_b ? adapter.rank : 1, is_f32});
    }
  }
  return tiles;
}

template <class Kernel>
void run(const Gradients& gradients, const Activations& x, const Partial& partial, Stream stream) {
  typename Kernel::Params params{};
  params.x = static_cast<decltype(params.x)>(x.rows);
  params.m = gradients.batch.m;
  params.features = x.features;
  params.row_group = gradients.batch.row_group;
  params.factors = gradients.factors;
  params.ld = gradients.batch.ranks;
  params.partial = partial.sums;
  params.count = partial.count;
  params.counter = partial.counters;
  params.feature_blocks = ceil_div(x.features, Kernel::kFeatures);
  params.splits = partial.splits;
  launch_by_tiles<Kernel>(params, tiles_of(gradients, x, partial), params.feature_blocks * partial.splits,
                          stream);
}

void over_rows(const Gradients& gradients, Context& context) {
  const Partial partial(gradients, context);
  with_half(gradients.batch.dtype, [&](auto type) {
    using T = decltype(type);
    for (const Activations& x : gradients.rows) {
      has_vectors(x.rows, x.features) ? run<LoraOverRows<T, true>>(gradients, x, partial, context.stream)
                                      : run<LoraOverRows<T, false>>(gradients, x, partial, context.stream);
    }
  });
}

}  // namespace

void lora_da(const LoraBatch& batch, const void* x, const float* dh, const std::vector<void*>& da,
             Context& context) {
  over_rows({batch, {{x, batch.k}}, false, dh, da}, context);
}

void lora_db(const LoraBatch& batch, const std::vector<Activations>& dy, const float* h,
             const std::vector<void*>& db, Context& context) {
  over_rows({batch, dy, true, h, db}, context);
}

}  // namespace peft_kernels::cuda
