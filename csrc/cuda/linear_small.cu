#include "launch.cuh"
#include "linear.h"
#include "linear_small.cuh"

namespace peft_kernels::cuda {
namespace {

template <class T, class Table, int kTokenTiles, int kRowTiles>
Status run(const LinearParams& from, const Cut& cut, uint32_t* counters, void* workspace, Stream stream) {
  using Kernel = LinearSmall<T, Table, kTokenTiles, kRowTiles>;
  const typename Kernel::Params params{linear_args<T>(from),
                                       {cut.splits, counters, static_cast<float*>(workspace)},
                                       cut.part,
                                       cut.shared_offset,
                                       cut.x_offset};
  return launch<Kernel>(params, cut.blocks, stream, static_cast<int>(cut.shared_bytes));
}

}  // namespace

Status start_linear(const SmallShape& shape, const LinearParams& params, const Cut& cut, uint32_t* counters,
                    void* workspace, Stream stream) {
  return with_operands(params.dtype, shape.wide_table, [&](auto type, auto table) {
    using T = decltype(type);
    using Table = decltype(table);
    switch (shape.token_tiles) {
      case 1:
        return run<T, Table, 1, 1>(params, cut, counters, workspace, stream);
      case 2:
        return run<T, Table, 2, 2>(params, cut, counters, workspace, stream);
      default:
        return run<T, Table, 4, 2>(params, cut, counters, workspace, stream);
    }
  });
}

}  // namespace peft_kernels::cuda
