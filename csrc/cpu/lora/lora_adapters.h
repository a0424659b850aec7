// The adapters of one call, and the rows that each serves.
#pragma once

#include <utility>
#include <vector>

#include "../../common/lora_args.h"
#include "dropout.h"

namespace peft_kernels::cpu {

// Consecutive rows that an adapter serves.
struct RowRun {
  int64_t begin, end;
};

// Whether activations are multiplied with an adapter's matrix in pairs of bf16, which is exact.
inline bool in_pairs(const Tensor& x, const Tensor& matrix) {
  return kernels().has_pairs && x.scalar_type() == at::kBFloat16 && matrix.scalar_type() == at::kBFloat16;
}

// Whether h, or its gradient, is rounded for a multiplication in bf16 pairs: no result is more precise than
// bf16. Not for a few rows, which are bound by reading the weight.
inline bool rounds_factors(const Tensor& x, const Tensor& matrix, int64_t rows) {
  return in_pairs(x, matrix) && rows > kFewRows;
}

struct Adapter : AdapterArgs {
  DropoutMask mask;
  std::vector<RowRun> runs;
  bool a_in_pairs, b_in_pairs;
  // Whether the factor that is multiplied with this matrix, or that forms its gradient, is rounded.
  bool a_rounds, b_rounds;

  Adapter(AdapterArgs args, const Tensor& x, const OptionalTensor& seed, std::vector<RowRun> runs)
      : AdapterArgs(std::move(args)),
        mask(mask_of(dropout, seed, a.size(1))),
        runs(std::move(runs)),
        a_in_pairs(in_pairs(x, a)),
        b_in_pairs(in_pairs(x, b)),
        a_rounds(rounds_factors(x, a, rows_of(x))),
        b_rounds(rounds_factors(x, b, rows_of(x))) {}
};

using Adapters = std::vector<Adapter>;

// The rows of a group, as runs of neighbours.
inline std::vector<RowRun> runs_of(int64_t group, const OptionalTensor& row_group, int64_t rows) {
  if (!row_group) return {{0, rows}};
  const int64_t* groups = row_group->const_data_ptr<int64_t>();
  std::vector<RowRun> runs;
  for (int64_t m = 0; m < rows;) {
    const int64_t begin = m;
    while (m < rows && groups[m] == groups[begin]) ++m;
    if (groups[begin] == group) runs.push_back({begin, m});
  }
  return runs;
}

inline Adapters adapters_of(const Tensor& x, std::vector<AdapterArgs> args, const OptionalTensor& seed,
                            const OptionalTensor& row_group) {
  OptionalTensor groups = row_group;
  if (row_group) groups = row_group->contiguous();
  Adapters adapters;
  adapters.reserve(args.size());
  for (AdapterArgs& adapter : args) {
    std::vector<RowRun> runs = runs_of(adapter.group, groups, rows_of(x));
    adapters.emplace_back(std::move(adapter), x, seed, std::move(runs));
  }
  return adapters;
}

}  // namespace peft_kernels::cpu
