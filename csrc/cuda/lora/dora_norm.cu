// Launches SumRows and FinishNorms: the row norms of W + s B A.
#include "../core/launch.cuh"
#include "dora_norm.cuh"

namespace peft_kernels::cuda {
namespace {

// Above eight ranks, the kernel for 16.
constexpr int kFewRanks = 8, kManyRanks = 16;
using Any = SumRows<2>;

int64_t row_blocks_of(const RowSums& params) { return ceil_div(params.n, Any::kRowsOfBlock); }
int64_t rank_blocks_of(const RowSums& params) {
  return std::max<int64_t>(ceil_div(params.ranks, kManyRanks), 1);
}

template <int kRankTiles>
void run(const RowSums& params, int splits, float* out, Stream stream) {
  using Kernel = SumRows<kRankTiles>;
  const int64_t row_blocks = row_blocks_of(params);
  launch<Kernel>(
      {params.weight, params.a, params.n, params.k, static_cast<int>(params.ranks), row_blocks, splits, out},
      row_blocks * splits * rank_blocks_of(params), stream, sizeof(typename Kernel::Shared));
}

}  // namespace

bool has_row_sums(const RowSums& params) {
  // Group indices are 32-bit.
  return params.k > 0 && params.k % Any::kGroup == 0 &&
         params.n * params.k / Any::kGroup < int64_t{1} << 32 &&
         (1 << params.weight.block_shift) % Any::kGroup == 0 && are_aligned({params.weight.packed}, 8) &&
         are_aligned({params.a});
}

int row_sums_splits(const RowSums& params, const Card& card) {
  return splits_for(row_blocks_of(params) * rank_blocks_of(params), ceil_div(params.k, Any::kSlice), card);
}

void row_sums(const RowSums& params, int splits, float* out, Stream stream) {
  params.ranks > kFewRanks ? run<2>(params, splits, out, stream) : run<1>(params, splits, out, stream);
}

void dora_norm(const DoraNorm& params, Stream stream) {
  launch<FinishNorms>(params, ceil_div(params.n, FinishNorms::kRowsOfBlock), stream);
}

}  // namespace peft_kernels::cuda
