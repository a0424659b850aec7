// Transposes a matrix.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>

#include "../../common/checks.h"
#include "parallel.h"

namespace peft_kernels::cpu {

// out[columns, rows] = t[rows, columns] transposed, in out's dtype. Both are contiguous.
inline void transpose(const Tensor& t, Tensor& out) {
  const TransposeParams params{t.const_data_ptr(),     dtype_of(t, "t"),     t.size(0), t.size(1), t.size(1),
                               out.mutable_data_ptr(), dtype_of(out, "out"), t.size(0)};
  const int64_t tiles = ceil_div(params.rows, kTransposeRows);
  const auto transpose_rows = kernels().transpose_rows;
  parallel_for(0, tiles, ceil_div(kElementwiseGrain, kTransposeRows * std::max<int64_t>(params.cols, 1)),
               [&](int64_t begin, int64_t end) {
                 transpose_rows(params, begin * kTransposeRows, std::min(end * kTransposeRows, params.rows));
               });
}

}  // namespace peft_kernels::cpu
