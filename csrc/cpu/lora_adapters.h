// The adapters of one call, and the rows that each serves.
#pragma once

#include <utility>
#include <vector>

#include "../common/lora_args.h"
#include "dropout.h"

namespace peft_kernels::cpu {

// Rows that an adapter serves.
struct RowRun {
  int64_t begin, end;
};

struct Adapter : AdapterArgs {
  DropoutMask mask;
  std::vector<RowRun> runs;
  // Whether products with this matrix are in pairs of bf16, with h or its gradient rounded for them: no
  // result is more precise than that.
  bool a_in_pairs, b_in_pairs;

  Adapter(AdapterArgs args, const Tensor& x, const OptionalTensor& seed, std::vector<RowRun> runs)
      : AdapterArgs(std::move(args)),
        mask(mask_of(dropout, seed, a.size(1))),
        runs(std::move(runs)),
        a_in_pairs(in_pairs(x, a)),
        b_in_pairs(in_pairs(x, b)) {}

 private:
  // Not for a few rows: those wait for the weight.
  static bool in_pairs(const Tensor& x, const Tensor& matrix) {
    return kernels().has_pairs && x.scalar_type() == at::kBFloat16 && matrix.scalar_type() == at::kBFloat16 &&
           rows_of(x) > kFewRows;
  }
};

using Adapters = std::vector<Adapter>;

// The rows of each group, as runs of equal neighbours.
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
