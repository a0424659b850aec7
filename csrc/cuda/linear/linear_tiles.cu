// Launches LinearTiles: y = x W^T + u v^T + bias for more tokens.
#include "linear_tiles.cuh"

namespace peft_kernels::cuda {
namespace {

template <class T, class Table, int kFeatureWarps>
void run(const Cut& cut, const LinearParams& params, Context& context) {
  launch<LinearTiles<T, Table, kFeatureWarps>>({params, share_params(cut, context)}, cut.blocks,
                                               context.stream, static_cast<int>(cut.shared_bytes));
}

}  // namespace

void start_kernel(const TileShape& shape, const Cut& cut, const LinearParams& params, Context& context) {
  with_operands(params.dtype, shape.wide_table, [&](auto type, auto table) {
    using T = decltype(type);
    using Table = decltype(table);
    shape.feature_warps == 8 ? run<T, Table, 8>(cut, params, context)
                             : run<T, Table, 4>(cut, params, context);
  });
}

}  // namespace peft_kernels::cuda
