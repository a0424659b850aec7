#include <vector>

#include "lora_expand.cuh"
#include "lora_launch.h"

namespace peft_kernels::cuda {
namespace {

struct Terms {
  const void* const* term;
  int count;
};

template <class T, bool kVector>
Status run(const LoraBatch& batch, const Terms& terms, int64_t features, const float* ranks,
           const std::vector<Delta>& deltas, void* out, Stream stream) {
  using Kernel = LoraExpand<T, kVector>;
  typename Kernel::Params params{};
  params.out = static_cast<T*>(out);
  params.m = batch.m;
  params.features = features;
  params.row_group = batch.row_group;
  params.ranks = ranks;
  params.ld = batch.ranks;
  params.feature_blocks = ceil_div(features, Kernel::kWarps * Kernel::kFeatures);
  const int64_t blocks = ceil_div(batch.m, Kernel::kRows) * params.feature_blocks;
  int next_term = 0;
  size_t next_delta = 0;
  do {
    // What earlier launches have summed up is a term of the next one.
    params.terms = 0;
    if (next_term > 0 || next_delta > 0) params.term[params.terms++] = params.out;
    while (next_term < terms.count && params.terms < Kernel::kMaxTerms) {
      params.term[params.terms++] = static_cast<const T*>(terms.term[next_term++]);
    }
    params.deltas = 0;
    while (next_term == terms.count && next_delta < deltas.size() && params.deltas < Kernel::kMaxDeltas) {
      params.delta[params.deltas++] = deltas[next_delta++];
    }
    const Status status = launch<Kernel>(params, blocks, stream);
    if (status != 0) return status;
  } while (next_term < terms.count || next_delta < deltas.size());
  return 0;
}

Status expand(const LoraBatch& batch, const Terms& terms, int64_t features, const float* ranks,
              const std::vector<Delta>& deltas, void* out, Stream stream) {
  bool vectors = has_vectors(out, features);
  for (int i = 0; i < terms.count; ++i) vectors = vectors && has_vectors(terms.term[i], features);
  for (const Delta& delta : deltas) {
    if (delta.feature_stride == 1) vectors = vectors && has_vectors(delta.factor, features);
  }
  return with_half(batch.dtype, [&](auto type) {
    using T = decltype(type);
    return vectors ? run<T, true>(batch, terms, features, ranks, deltas, out, stream)
                   : run<T, false>(batch, terms, features, ranks, deltas, out, stream);
  });
}

Delta delta_of(const AdapterView& adapter) {
  Delta delta{};
  delta.group = adapter.group;
  delta.column = adapter.h_begin;
  delta.rank = adapter.rank;
  return delta;
}

}  // namespace

Status lora_y(const LoraBatch& batch, int layer, const void* const* term, int terms, int64_t n,
              const float* h, void* y, Stream stream) {
  std::vector<Delta> deltas;
  for (int i = 0; i < batch.adapters; ++i) {
    const AdapterView& adapter = batch.adapter[i];
    if (adapter.layer != layer) continue;
    Delta delta = delta_of(adapter);
    delta.factor = adapter.b;
    delta.rank_stride = 1;
    delta.feature_stride = adapter.rank;
    delta.scale = adapter.scaling;
    delta.is_f32 = adapter.b_dtype == DType::kF32;
    deltas.push_back(delta);
  }
  return expand(batch, {term, terms}, n, h, deltas, y, stream);
}

Status lora_dx(const LoraBatch& batch, const void* const* term, int terms, const float* dh, void* dx,
               Stream stream) {
  std::vector<Delta> deltas;
  for (int i = 0; i < batch.adapters; ++i) {
    const AdapterView& adapter = batch.adapter[i];
    Delta delta = delta_of(adapter);
    delta.factor = adapter.a;
    delta.rank_stride = batch.k;
    delta.feature_stride = 1;
    delta.mask = adapter.mask;
    delta.scale = adapter.mask.scale;
    delta.is_f32 = adapter.a_dtype == DType::kF32;
    deltas.push_back(delta);
  }
  return expand(batch, {term, terms}, batch.k, dh, deltas, dx, stream);
}

}  // namespace peft_kernels::cuda
