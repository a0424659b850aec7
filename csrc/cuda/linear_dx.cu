#include "launch.cuh"
#include "linear.h"
#include "linear_dx.cuh"

namespace peft_kernels::cuda {
namespace {

template <class T, class Table, int kTokenTiles>
Status run(const LinearParams& params, const Cut& cut, uint32_t* counters, void* workspace, Stream stream) {
  using Kernel = LinearDx<T, Table, kTokenTiles>;
  const ShareParams work{static_cast<int>(cut.units), cut.part, counters, static_cast<float*>(workspace)};
  return launch<Kernel>({linear_args<T>(params), work, cut.shared_offset, cut.x_offset}, cut.blocks, stream,
                        static_cast<int>(cut.shared_bytes));
}

}  // namespace

Status start_linear_dx(const DxShape& shape, const LinearParams& params, const Cut& cut, uint32_t* counters,
                       void* workspace, Stream stream) {
  return with_operands(params.dtype, shape.wide_table, [&](auto type, auto table) {
    using T = decltype(type);
    using Table = decltype(table);
    switch (shape.token_tiles) {
      case 1:
        return run<T, Table, 1>(params, cut, counters, workspace, stream);
      case 2:
        return run<T, Table, 2>(params, cut, counters, workspace, stream);
      case 4:
        return run<T, Table, 4>(params, cut, counters, workspace, stream);
      default:  // no plan has them with a wide table, beside which there is no room
        return run<T, NarrowTable, 8>(params, cut, counters, workspace, stream);
    }
  });
}

}  // namespace peft_kernels::cuda
