#include "lora_from_ranks.cuh"
#include "lora_launch.h"

namespace peft_kernels::cuda {
namespace {

template <class T, bool kVector>
Status run(const LoraBatch& batch, const void* const* term, int terms, const float* dh, void* dx,
           Stream stream) {
  using Kernel = FromRanks<T, kVector>;
  typename Kernel::Params params{};
  params.out = static_cast<T*>(dx);
  params.m = batch.m;
  params.features = batch.k;
  params.dh = dh;
  params.ld = batch.ranks;
  params.feature_blocks = ceil_div(batch.k, Kernel::kWarps * Kernel::kFeatures);
  int adapter = 0, next_term = 0;
  do {
    // What earlier launches have summed up is a term of the next one.
    params.terms = 0;
    if (next_term > 0 || adapter > 0) params.term[params.terms++] = params.out;
    while (next_term < terms && params.terms < Kernel::kMaxTerms) {
      params.term[params.terms++] = static_cast<const T*>(term[next_term++]);
    }
    params.adapters = 0;
    while (next_term == terms && adapter < batch.adapters && params.adapters < Kernel::kMaxAdapters) {
      const AdapterView& own = batch.adapter[adapter++];
      params.adapter[params.adapters++] = {own.a, own.mask, own.h_begin, own.rank,
                                           own.a_dtype == DType::kF32};
    }
    const Status status =
        launch<Kernel>(params, ceil_div(batch.m, Kernel::kRows) * params.feature_blocks, stream);
    if (status != 0) return status;
  } while (next_term < terms || adapter < batch.adapters);
  return 0;
}

}  // namespace

Status lora_dx(const LoraBatch& batch, const void* const* term, int terms, const float* dh, void* dx,
               Stream stream) {
  bool vectors = has_vectors(dx, batch.k);
  for (int i = 0; i < terms; ++i) vectors = vectors && has_vectors(term[i], batch.k);
  for (int i = 0; i < batch.adapters; ++i) vectors = vectors && has_vectors(batch.adapter[i].a, batch.k);
  return with_half(batch.dtype, [&](auto type) {
    using T = decltype(type);
    return vectors ? run<T, true>(batch, term, terms, dh, dx, stream)
                   : run<T, false>(batch, term, terms, dh, dx, stream);
  });
}

}  // namespace peft_kernels::cuda
