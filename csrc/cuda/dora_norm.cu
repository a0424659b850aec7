#include "dora_norm.cuh"
#include "launch.cuh"

namespace peft_kernels::cuda {
namespace {

// With more than eight ranks, the kernel of 16.
constexpr int kFewRanks = 8, kManyRanks = 16;
using Any = SumRows<kManyRanks>;

int64_t row_blocks_of(const RowSums& params) { return ceil_div(params.n, Any::kRowsOfBlock); }
int64_t rank_blocks_of(const RowSums& params) {
  return std::max<int64_t>(ceil_div(params.ranks, kManyRanks), 1);
}

template <int kRanks>
void run(const RowSums& params, int splits, float* out, Stream stream) {
  using Kernel = SumRows<kRanks>;
  const int64_t row_blocks = row_blocks_of(params);
  launch<Kernel>(
      {params.weight, params.a, params.n, params.k, static_cast<int>(params.ranks), row_blocks, splits, out},
      row_blocks * splits * rank_blocks_of(params), stream, sizeof(typename Kernel::Shared));
}

}  // namespace

bool has_row_sums(const RowSums& params) {
  return params.k > 0 && params.k % Any::kRun == 0 && are_aligned({params.weight.packed}, 4) &&
         are_aligned({params.a});
}

int row_sums_splits(const RowSums& params, const Card& card) {
  return splits_for(row_blocks_of(params) * rank_blocks_of(params), ceil_div(params.k, Any::kSlice), card);
}

void row_sums(const RowSums& params, int splits, float* out, Stream stream) {
  params.ranks > kFewRanks ? run<kManyRanks>(params, splits, out, stream)
                           : run<kFewRanks>(params, splits, out, stream);
}

void dora_norm(const DoraNorm& params, Stream stream) {
  launch<FinishNorms>(params, ceil_div(params.n, FinishNorms::kRowsOfBlock), stream);
}

}  // namespace peft_kernels::cuda
