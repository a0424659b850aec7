#include "dora_norm.cuh"
#include "lora_launch.h"
#include "sum_splits.cuh"

namespace peft_kernels::cuda {
namespace {

// With more than eight ranks, the kernel of 16.
constexpr int kFewRanks = 8, kManyRanks = 16;
using Any = SumRows<kManyRanks>;

int64_t row_blocks_of(const RowSumsParams& params) { return ceil_div(params.n, Any::kRowsOfBlock); }
int64_t rank_blocks_of(const RowSumsParams& params) {
  return std::max<int64_t>(ceil_div(params.ranks, kManyRanks), 1);
}
int splits_of(const RowSumsParams& params, const Card& card) {
  return splits_for(row_blocks_of(params) * rank_blocks_of(params), ceil_div(params.k, Any::kSlice), card);
}
int64_t count_of(const RowSumsParams& params) { return params.n * (1 + params.ranks); }

template <int kRanks>
Status run(const RowSumsParams& params, int splits, float* out, Stream stream) {
  using Kernel = SumRows<kRanks>;
  const int64_t row_blocks = row_blocks_of(params);
  return launch<Kernel>({decode_params<float>(params.weight), params.a, params.n, params.k,
                         static_cast<int>(params.ranks), row_blocks, splits, out},
                        row_blocks * splits * rank_blocks_of(params), stream,
                        sizeof(typename Kernel::Shared));
}

}  // namespace

bool has_row_sums(const RowSumsParams& params) {
  return params.k > 0 && params.k % Any::kRun == 0 &&
         reinterpret_cast<uintptr_t>(params.weight.packed) % 4 == 0 &&
         reinterpret_cast<uintptr_t>(params.a) % 16 == 0;
}

int64_t row_sums_workspace(const RowSumsParams& params, const Card& card) {
  const int splits = splits_of(params, card);
  return splits > 1 ? splits * count_of(params) * int64_t{sizeof(float)} : 0;
}

Status row_sums(const RowSumsParams& params, float* out, const Card& card, void* workspace, Stream stream) {
  const int splits = splits_of(params, card);
  float* sums = splits > 1 ? static_cast<float*>(workspace) : out;
  const Status status = params.ranks > kFewRanks ? run<kManyRanks>(params, splits, sums, stream)
                                                 : run<kFewRanks>(params, splits, sums, stream);
  if (status != 0 || splits == 1) return status;
  return launch<SumSplits>({sums, splits, count_of(params), out},
                           ceil_div(count_of(params), SumSplits::kThreads), stream);
}

}  // namespace peft_kernels::cuda
