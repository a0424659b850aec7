#include "launch.cuh"
#include "linear.h"
#include "linear_tiles.cuh"

namespace peft_kernels::cuda {
namespace {

template <class T, class Table, int kFeatureWarps>
Status run(const LinearParams& params, const Cut& cut, uint32_t* counters, void* workspace, Stream stream) {
  using Kernel = LinearTiles<T, Table, kFeatureWarps>;
  const ShareParams work{static_cast<int>(cut.units), cut.part, counters, static_cast<float*>(workspace)};
  return launch<Kernel>({linear_args<T>(params), work}, cut.blocks, stream,
                        static_cast<int>(cut.shared_bytes));
}

}  // namespace

Status start_linear(const TileShape& shape, const LinearParams& params, const Cut& cut, uint32_t* counters,
                    void* workspace, Stream stream) {
  return with_operands(params.dtype, shape.wide_table, [&](auto type, auto table) {
    using T = decltype(type);
    using Table = decltype(table);
    return shape.feature_warps == 8 ? run<T, Table, 8>(params, cut, counters, workspace, stream)
                                    : run<T, Table, 4>(params, cut, counters, workspace, stream);
  });
}

}  // namespace peft_kernels::cuda
