#include <vector>

#include "lora_launch.h"
#include "lora_slab.cuh"

namespace peft_kernels::cuda {
namespace {

constexpr int64_t kDepthUnit = 16;  // of a slab

SlabAdapter forward_part(const LoraBatch& batch, const AdapterView& adapter, const float* h) {
  const bool is_f32 = adapter.b_dtype == DType::kF32;
  return {{{h + adapter.h_begin, batch.ranks, 1, adapter.scaling, true},
           {adapter.b, adapter.rank, 1, 1.0f, is_f32}},
          adapter.rank,
          is_f32 ? 3 : 2};
}

SlabAdapter backward_part(const LoraBatch& batch, const AdapterView& adapter, const float* dh) {
  const bool is_f32 = adapter.a_dtype == DType::kF32;
  return {{{dh + adapter.h_begin, batch.ranks, 1, 1.0f, true}, {adapter.a, 1, batch.k, 1.0f, is_f32}},
          adapter.rank,
          is_f32 ? 3 : 2};
}

// For each adapter that `chosen` takes, what `part` makes of it.
template <class Chosen, class Part>
std::vector<SlabAdapter> slab_parts(const LoraBatch& batch, const Chosen& chosen, const Part& part) {
  std::vector<SlabAdapter> parts;
  for (int i = 0; i < batch.adapters; ++i) {
    if (chosen(batch.adapter[i])) parts.push_back(part(batch.adapter[i]));
  }
  return parts;
}

std::vector<SlabAdapter> forward_parts(const LoraBatch& batch, int layer, const float* h) {
  return slab_parts(
      batch, [&](const AdapterView& adapter) { return adapter.layer == layer; },
      [&](const AdapterView& adapter) { return forward_part(batch, adapter, h); });
}

std::vector<SlabAdapter> backward_parts(const LoraBatch& batch, const float* dh) {
  return slab_parts(
      batch, [](const AdapterView&) { return true; },
      [&](const AdapterView& adapter) { return backward_part(batch, adapter, dh); });
}

int64_t depth_of(const SlabAdapter& part) { return int64_t{part.rank} * part.parts; }

int64_t depth_of(const std::vector<SlabAdapter>& parts) {
  int64_t depth = 0;
  for (const SlabAdapter& part : parts) depth += depth_of(part);
  return ceil_div(depth, kDepthUnit) * kDepthUnit;
}

template <class T>
Status pack(const std::vector<SlabAdapter>& parts, int64_t m, int64_t v_rows, bool v_transposed, void* u,
            void* v, Stream stream) {
  using Kernel = PackSlab<T>;
  typename Kernel::Params params{};
  params.side[0] = {static_cast<T*>(u), m, false};
  params.side[1] = {static_cast<T*>(v), v_rows, v_transposed};
  params.ld = depth_of(parts);
  for (size_t i = 0; i < parts.size(); ++i) {
    params.adapter[params.adapters++] = parts[i];
    params.end += depth_of(parts[i]);
    const bool last = i + 1 == parts.size();
    if (last) params.end = params.ld;
    if (last || params.adapters == Kernel::kMaxAdapters) {
      const int64_t depth = params.end - params.begin;
      params.blocks_of_u = ceil_div(m * depth, Kernel::kThreads);
      const Status status =
          launch<Kernel>(params, params.blocks_of_u + ceil_div(v_rows * depth, Kernel::kThreads), stream);
      if (status != 0) return status;
      params.begin = params.end;
      params.adapters = 0;
    }
  }
  return 0;
}

}  // namespace

int64_t lora_slab_depth(const LoraBatch& batch, int layer) {
  return depth_of(forward_parts(batch, layer, nullptr));
}

Status lora_slab(const LoraBatch& batch, int layer, int64_t n, const float* h, void* u, void* v,
                 Stream stream) {
  return with_half(batch.dtype, [&](auto type) {
    return pack<decltype(type)>(forward_parts(batch, layer, h), batch.m, n, false, u, v, stream);
  });
}

int64_t lora_dx_slab_depth(const LoraBatch& batch) { return depth_of(backward_parts(batch, nullptr)); }

Status lora_dx_slab(const LoraBatch& batch, const float* dh, void* u, void* v, Stream stream) {
  return with_half(batch.dtype, [&](auto type) {
    return pack<decltype(type)>(backward_parts(batch, dh), batch.m, batch.k, true, u, v, stream);
  });
}

}  // namespace peft_kernels::cuda
