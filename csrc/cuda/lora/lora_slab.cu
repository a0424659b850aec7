// Launches PackSlab: the deltas of adapters as one product in bf16.
#include "../core/launch.cuh"
#include "lora.h"
#include "lora_slab.cuh"

namespace peft_kernels::cuda {
namespace {

SlabAdapter part_of(const LoraBatch& batch, const AdapterView& adapter, bool is_dx, const float* ranks) {
  const bool is_f32 = (is_dx ? adapter.a_dtype : adapter.b_dtype) == DType::kF32;
  const SlabFactor u{ranks + adapter.h_begin, batch.ranks, 1, is_dx ? 1.0f : adapter.scaling, true};
  const SlabFactor v = is_dx ? SlabFactor{adapter.a, 1, batch.k, 1.0f, is_f32}
                             : SlabFactor{adapter.b, adapter.rank, 1, 1.0f, is_f32};
  return {{u, v}, adapter.rank, is_f32 || batch.dtype == DType::kF16 ? 3 : 2};
}

template <class T>
void pack(const LoraBatch& batch, int layer, bool is_dx, int64_t v_rows, const float* ranks, int64_t ld,
          void* u, void* v, Stream stream) {
  using Kernel = PackSlab<T>;
  typename Kernel::Params params{};
  params.side[0] = {static_cast<bf16*>(u), batch.m, false};
  params.side[1] = {static_cast<bf16*>(v), v_rows, is_dx};
  params.ld = ld;
  const auto start = [&] {
    const int64_t depth = params.end - params.begin;
    params.blocks_of_u = ceil_div(batch.m * depth, Kernel::kThreads);
    launch<Kernel>(params, params.blocks_of_u + ceil_div(v_rows * depth, Kernel::kThreads), stream);
    params.begin = params.end;
    params.adapters = 0;
  };
  for (const AdapterView& adapter : batch.adapters) {
    if (adapter.layer != layer) continue;
    if (params.adapters == Kernel::kMaxAdapters) start();
    const SlabAdapter part = part_of(batch, adapter, is_dx, ranks);
    params.adapter[params.adapters++] = part;
    params.end += int64_t{part.rank} * part.parts;
  }
  params.end = ld;
  start();
}

}  // namespace

int64_t lora_slab_depth(const LoraBatch& batch, int layer, bool is_dx) {
  constexpr int64_t kUnit = 16;
  int64_t depth = 0;
  for (const AdapterView& adapter : batch.adapters) {
    if (adapter.layer == layer)
      depth += int64_t{adapter.rank} * part_of(batch, adapter, is_dx, nullptr).parts;
  }
  return ceil_div(depth, kUnit) * kUnit;
}

void lora_slab(const LoraBatch& batch, int layer, bool is_dx, int64_t v_rows, const float* ranks, void* u,
               void* v, Stream stream) {
  const int64_t depth = lora_slab_depth(batch, layer, is_dx);
  with_half(batch.dtype, [&](auto type) {
    pack<decltype(type)>(batch, layer, is_dx, v_rows, ranks, depth, u, v, stream);
  });
}

}  // namespace peft_kernels::cuda
