// Ops cast and add_residual: casts of lists of tensors, and sums of two dtypes.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "../../common/checks.h"
#include "kernel_table.h"
#include "namespace.h"
#include "parallel.h"

namespace peft_kernels::cpu {
namespace {

// All tensors as one range of elements, divided evenly among threads.
std::vector<Tensor> cast(at::TensorList x, at::ScalarType dtype) {
  struct Piece {
    CastParams params;
    int64_t end;  // in the range
  };
  std::vector<Tensor> sources, results;
  std::vector<Piece> pieces;
  sources.reserve(x.size());
  results.reserve(x.size());
  pieces.reserve(x.size());
  int64_t total = 0;
  for (const Tensor& one : x) {
    const Tensor& source = sources.emplace_back(one.contiguous());
    Tensor& result = results.emplace_back(at::empty(source.sizes(), source.options().dtype(dtype)));
    total += source.numel();
    pieces.push_back({{source.const_data_ptr(), dtype_of(source, "x"), nullptr, DType::kF32,
                       result.mutable_data_ptr(), dtype_of(result, "dtype")},
                      total});
  }
  const auto kernel = kernels().cast;
  parallel_for(0, total, kElementwiseGrain, [&](int64_t begin, int64_t end) {
    int64_t start = 0;
    for (const Piece& piece : pieces) {
      const int64_t from = std::max(begin, start), to = std::min(end, piece.end);
      if (from < to) kernel(piece.params, from - start, to - start);
      start = piece.end;
    }
  });
  return results;
}

Tensor add_residual(const Tensor& x_in, const Tensor& residual_in) {
  check_shape(residual_in, x_in.sizes(), "residual");
  const Tensor x = x_in.contiguous(), residual = residual_in.contiguous();
  Tensor sum =
      at::empty(x.sizes(), x.options().dtype(at::promote_types(x.scalar_type(), residual.scalar_type())));
  const CastParams params{x.const_data_ptr(),        dtype_of(x, "x"),
                          residual.const_data_ptr(), dtype_of(residual, "residual"),
                          sum.mutable_data_ptr(),    dtype_of(sum, "sum")};
  const auto kernel = kernels().cast;
  parallel_for(0, sum.numel(), kElementwiseGrain,
               [&](int64_t begin, int64_t end) { kernel(params, begin, end); });
  return sum;
}

}  // namespace

TORCH_LIBRARY_IMPL(PEFT_KERNELS_NAMESPACE, CPU, m) {
  m.impl("cast", cast);
  m.impl("add_residual", add_residual);
}

}  // namespace peft_kernels::cpu
