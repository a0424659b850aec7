// Op rotary.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "../../common/checks.h"
#include "../../common/integers.h"
#include "../core/namespace.h"
#include "../core/parallel.h"

namespace peft_kernels::cpu {
namespace {

// Query and key heads, in one list of tokens for all threads.
std::vector<Tensor> rotary(at::TensorList x, const Tensor& cos_in, const Tensor& sin_in, bool inverse,
                           at::ScalarType dtype) {
  dtype_of(cos_in, "cos");
  TORCH_CHECK(cos_in.dim() == 3, "cos: expected shape (batch or 1, rows, features), got ", cos_in.sizes());
  TORCH_CHECK(cos_in.size(2) % 2 == 0, "cos: expected an even number of features, got ", cos_in.size(2));
  check_dtype(sin_in, cos_in.scalar_type(), "sin");
  check_shape(sin_in, cos_in.sizes(), "sin");
  const Tensor cos = cos_in.to(at::kFloat).contiguous(), sin = sin_in.to(at::kFloat).contiguous();
  const int64_t rows = cos.size(1), features = cos.size(2);
  std::vector<Tensor> heads, out;
  std::vector<RotaryParams> params;
  int64_t sequences = 0, elements = 0;  // elements: per token
  for (const Tensor& one : x) {
    RotaryParams p{};
    p.dtype = dtype_of(one, "x");
    TORCH_CHECK(one.dim() == 4 && one.size(1) == rows && one.size(3) == features &&
                    (cos.size(0) == 1 || cos.size(0) == one.size(0)),
                "x: expected shape (", cos.size(0), " or any, ", rows, ", heads, ", features, "), got ",
                one.sizes());
    check_dtype(one, x[0].scalar_type(), "x");
    TORCH_CHECK(one.size(0) == x[0].size(0), "x: expected ", x[0].size(0), " sequences, got ", one.size(0));
    const Tensor& t = heads.emplace_back(one.stride(3) == 1 || features <= 1 ? one : one.contiguous());
    Tensor& y = out.emplace_back(at::empty(one.sizes(), one.options().dtype(dtype)));
    p.out_dtype = dtype_of(y, "dtype");
    p.x = t.const_data_ptr();
    p.x_sequence = t.stride(0);
    p.x_row = t.stride(1);
    p.x_head = t.stride(2);
    p.rows = rows;
    p.heads = t.size(2);
    p.features = features;
    p.cos = cos.const_data_ptr<float>();
    p.sin = sin.const_data_ptr<float>();
    p.angle_sequence = cos.size(0) == 1 ? 0 : rows * features;
    p.rounds = one.scalar_type() != at::kFloat && one.scalar_type() == cos_in.scalar_type();
    p.inverse = inverse;
    p.out = y.mutable_data_ptr();
    params.push_back(p);
    sequences = one.size(0);
    elements += p.heads * features;
  }
  const auto rotary = kernels().rotary;
  parallel_for(0, elements ? sequences * rows : 0,
               ceil_div(kElementwiseGrain, std::max<int64_t>(elements, 1)), [&](int64_t begin, int64_t end) {
                 for (const RotaryParams& p : params) rotary(p, begin, end);
               });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(PEFT_KERNELS_NAMESPACE, CPU, m) { m.impl("rotary", rotary); }

}  // namespace peft_kernels::cpu
