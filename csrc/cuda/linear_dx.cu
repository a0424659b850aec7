#include "launch.cuh"
#include "linear.h"
#include "linear_dx.cuh"

namespace peft_kernels::cuda {
namespace {

template <class T, class Table, int kTokenTiles>
Status run(const LinearParams& from, const Cut& cut, uint32_t* counters, void* workspace, Stream stream) {
  using Kernel = LinearDx<T, Table, kTokenTiles>;
  typename Kernel::Params params{};
  params.weight = decode_params<T>(from.weight);
  params.dy = static_cast<const T*>(from.x);
  params.m = static_cast<int>(from.m);
  params.n = static_cast<int>(from.n);
  params.k = static_cast<int>(from.k);
  params.u = static_cast<const T*>(from.slab.u);
  params.v = static_cast<const T*>(from.slab.v);
  params.depth = static_cast<int>(from.slab.depth);
  params.dx = static_cast<T*>(from.y);
  params.work = {static_cast<int>(cut.units), cut.part, counters, static_cast<float*>(workspace)};
  params.shared_offset = cut.shared_offset;
  params.stages_offset = cut.x_offset;
  return launch<Kernel>(params, cut.blocks, stream, static_cast<int>(cut.shared_bytes));
}

template <class T>
Status run(const DxShape& shape, const LinearParams& from, const Cut& cut, uint32_t* counters,
           void* workspace, Stream stream) {
  const auto of_table = [&](auto table) {
    using Table = decltype(table);
    switch (shape.token_tiles) {
      case 1:
        return run<T, Table, 1>(from, cut, counters, workspace, stream);
      case 2:
        return run<T, Table, 2>(from, cut, counters, workspace, stream);
      default:
        return run<T, Table, 4>(from, cut, counters, workspace, stream);
    }
  };
  if (shape.token_tiles == 8) return run<T, NarrowTable, 8>(from, cut, counters, workspace, stream);
  return shape.wide_table ? of_table(WideTable{}) : of_table(NarrowTable{});
}

}  // namespace

Status linear_dx(const DxShape& shape, const LinearParams& params, const Cut& cut, uint32_t* counters,
                 void* workspace, Stream stream) {
  return params.dtype == DType::kBF16 ? run<bf16>(shape, params, cut, counters, workspace, stream)
                                      : run<fp16>(shape, params, cut, counters, workspace, stream);
}

}  // namespace peft_kernels::cuda
