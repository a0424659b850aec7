// Launches LinearSmall: y = x W^T + u v^T + bias for few tokens.
#include "linear_small.cuh"

namespace peft_kernels::cuda {
namespace {

template <class T, class Table, class Scales, int kTokenTiles, int kRowTiles>
void run(const Cut& cut, const LinearParams& params, Context& context) {
  const int groups = params.k / kGroup;
  const SliceParams work{cut.splits,
                         groups / cut.splits,
                         groups % cut.splits,
                         static_cast<int>(cut.tiles),
                         cut.part,
                         cut.counters != 0,
                         context.counters(cut.counters),
                         static_cast<float*>(context.workspace(cut.workspace_bytes))};
  launch<LinearSmall<T, Table, Scales, kTokenTiles, kRowTiles>>(
      {params, work, cut.shared_offset, cut.x_offset}, cut.blocks, context.stream,
      static_cast<int>(cut.shared_bytes));
}

template <class T, class Table, class Scales>
void run(const SmallShape& shape, const Cut& cut, const LinearParams& params, Context& context) {
  switch (shape.token_tiles) {
    case 1:
      return run<T, Table, Scales, 1, 1>(cut, params, context);
    case 2:
      return run<T, Table, Scales, 2, 2>(cut, params, context);
    default:
      return run<T, Table, Scales, 4, 2>(cut, params, context);
  }
}

}  // namespace

void start_kernel(const SmallShape& shape, const Cut& cut, const LinearParams& params, Context& context) {
  if (shape.has_scale_codes) {
    return shape.wide_table ? run<bf16, WideTable, ScaleCodes>(shape, cut, params, context)
                            : run<bf16, NarrowTable, ScaleCodes>(shape, cut, params, context);
  }
  with_operands(params.dtype, shape.wide_table, [&](auto type, auto table) {
    run<decltype(type), decltype(table), GroupScales>(shape, cut, params, context);
  });
}

}  // namespace peft_kernels::cuda
