// Launches LinearDx: dx = dY W + u v.
#include "linear_dx.cuh"

namespace peft_kernels::cuda {
namespace {

template <class T, class Table, int kTokenTiles>
void run(const Cut& cut, const LinearParams& params, Context& context) {
  launch<LinearDx<T, Table, kTokenTiles>>(
      {{params, share_params(cut, context)}, cut.shared_offset, cut.x_offset}, cut.blocks, context.stream,
      static_cast<int>(cut.shared_bytes));
}

}  // namespace

void start_kernel(const DxShape& shape, const Cut& cut, const LinearParams& params, Context& context) {
  with_operands(params.dtype, shape.wide_table, [&](auto type, auto table) {
    using T = decltype(type);
    using Table = decltype(table);
    switch (shape.token_tiles) {
      case 1:
        return run<T, Table, 1>(cut, params, context);
      case 2:
        return run<T, Table, 2>(cut, params, context);
      case 4:
        return run<T, Table, 4>(cut, params, context);
      default:  // no plan uses these with a wide table, which leaves no space for them
        return run<T, NarrowTable, 8>(cut, params, context);
    }
  });
}

}  // namespace peft_kernels::cuda
