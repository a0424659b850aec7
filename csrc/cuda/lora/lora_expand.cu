// Launches LoraExpand and BottleneckExpand: from ranks to features.
#include "../core/launch.cuh"
#include "lora_expand.cuh"

namespace peft_kernels::cuda {
namespace {

struct Expansion {
  const LoraBatch& batch;
  int64_t features;
  const float* ranks;  // h or dh
  std::vector<const void*> terms;
  std::vector<Delta> deltas;
  void* out;
};

template <class T, class Kernel>
void run(const Expansion& from, Stream stream) {
  typename Kernel::Params params{};
  params.out = static_cast<T*>(from.out);
  params.m = from.batch.m;
  params.features = from.features;
  params.row_group = from.batch.row_group;
  params.ranks = from.ranks;
  params.ld = from.batch.ranks;
  params.feature_blocks = ceil_div(from.features, Kernel::kWarps * Kernel::kFeatures);
  const int64_t blocks = ceil_div(from.batch.m, Kernel::kRows) * params.feature_blocks;
  size_t next_term = 0, next_delta = 0;
  do {
    // The sum of earlier launches is a term of the next one.
    params.terms = 0;
    if (next_term > 0 || next_delta > 0) params.term[params.terms++] = params.out;
    while (next_term < from.terms.size() && params.terms < Kernel::kMaxTerms) {
      params.term[params.terms++] = static_cast<const T*>(from.terms[next_term++]);
    }
    params.deltas = 0;
    while (next_term == from.terms.size() && next_delta < from.deltas.size() &&
           params.deltas < Kernel::kMaxDeltas) {
      params.delta[params.deltas++] = from.deltas[next_delta++];
    }
    launch<Kernel>(params, blocks, stream);
  } while (next_term < from.terms.size() || next_delta < from.deltas.size());
}

template <template <class, bool> class Kernel>
void expand(const Expansion& from, Stream stream) {
  bool vectors = has_vectors(from.out, from.features);
  for (const void* term : from.terms) vectors = vectors && has_vectors(term, from.features);
  for (const Delta& delta : from.deltas) {
    if (delta.factor.feature_stride == 1) vectors = vectors && has_vectors(delta.factor.data, from.features);
    vectors = vectors && are_aligned({delta.bias});
  }
  with_half(from.batch.dtype, [&](auto type) {
    using T = decltype(type);
    vectors ? run<T, Kernel<T, true>>(from, stream) : run<T, Kernel<T, false>>(from, stream);
  });
}

Delta delta_of_b(const AdapterView& adapter, const float* bias) {
  return {{adapter.b, 1, adapter.rank, adapter.b_dtype == DType::kF32},
          bias,
          {},
          adapter.scaling,
          adapter.group,
          adapter.h_begin,
          adapter.rank};
}

std::vector<Delta> deltas_of(const LoraBatch& batch, int layer) {
  std::vector<Delta> deltas;
  for (const AdapterView& adapter : batch.adapters) {
    if (adapter.layer == layer) deltas.push_back(delta_of_b(adapter, nullptr));
  }
  return deltas;
}

}  // namespace

void lora_y(const LoraBatch& batch, int layer, int64_t n, const float* h, void* y, Stream stream) {
  const std::vector<Delta> deltas = deltas_of(batch, layer);
  if (!deltas.empty()) expand<LoraExpand>({batch, n, h, {y}, deltas, y}, stream);
}

void lora_deltas(const LoraBatch& batch, int layer, int64_t n, const float* h, void* y, Stream stream) {
  expand<LoraExpand>({batch, n, h, {}, deltas_of(batch, layer), y}, stream);
}

void lora_y(const LoraBatch& batch, int64_t n, const float* h, const void* term, const float* bias, void* y,
            Stream stream) {
  expand<BottleneckExpand>({batch, n, h, {term}, {delta_of_b(batch.adapters.at(0), bias)}, y}, stream);
}

void lora_dx(const LoraBatch& batch, const std::vector<const void*>& terms, const float* dh, void* dx,
             Stream stream) {
  std::vector<Delta> deltas;
  for (const AdapterView& adapter : batch.adapters) {
    deltas.push_back({{adapter.a, batch.k, 1, adapter.a_dtype == DType::kF32},
                      nullptr,
                      adapter.mask,
                      adapter.mask.scale,
                      adapter.group,
                      adapter.h_begin,
                      adapter.rank});
  }
  expand<LoraExpand>({batch, batch.k, dh, terms, deltas, dx}, stream);
}

}  // namespace peft_kernels::cuda
