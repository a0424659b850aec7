// Column sums of a matrix.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>

#include "../../common/checks.h"
#include "parallel.h"

namespace peft_kernels::cpu {

// scale * the sum over rows of a contiguous t[rows, columns], in fp32. The order of summation does not depend
// on the number of threads.
inline Tensor column_sums(const Tensor& t, float scale = 1.0f) {
  constexpr int64_t kColumns = 64;
  Tensor out = at::empty({t.size(1)}, t.options().dtype(at::kFloat));
  const ColumnSumsParams params{t.const_data_ptr(),           dtype_of(t, "t"), t.size(0), t.size(1), scale,
                                out.mutable_data_ptr<float>()};
  const auto sum = kernels().column_sums;
  parallel_for(0, ceil_div(params.cols, kColumns),
               ceil_div(kElementwiseGrain, std::max<int64_t>(params.rows, 1) * kColumns),
               [&](int64_t begin, int64_t end) {
                 sum(params, begin * kColumns, std::min(end * kColumns, params.cols));
               });
  return out;
}

}  // namespace peft_kernels::cpu
