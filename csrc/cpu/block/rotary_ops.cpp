// Op rotary.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <vector>

#include "../../common/integers.h"
#include "../../common/rotary_args.h"
#include "../core/namespace.h"
#include "../core/parallel.h"

namespace peft_kernels::cpu {
namespace {

// Query and key heads, in one list of tokens for all threads.
std::vector<Tensor> rotary(at::TensorList x, const Tensor& cos_in, const Tensor& sin_in, bool inverse,
                           at::ScalarType dtype) {
  const RotaryArgs args(x, cos_in, sin_in);
  const Tensor cos = args.cos.to(at::kFloat).contiguous(), sin = args.sin.to(at::kFloat).contiguous();
  std::vector<Tensor> out;
  std::vector<RotaryParams> params;
  int64_t elements = 0;  // per token
  for (const Tensor& t : args.x) {
    RotaryParams p{};
    p.dtype = args.dtype;
    Tensor& y = out.emplace_back(at::empty(t.sizes(), t.options().dtype(dtype)));
    p.out_dtype = dtype_of(y, "dtype");
    p.x = t.const_data_ptr();
    p.x_sequence = t.stride(0);
    p.x_row = t.stride(1);
    p.x_head = t.stride(2);
    p.rows = args.rows;
    p.heads = t.size(2);
    p.features = args.features;
    p.cos = cos.const_data_ptr<float>();
    p.sin = sin.const_data_ptr<float>();
    p.angle_sequence = cos.size(0) == 1 ? 0 : args.rows * args.features;
    p.rounds = args.rounds();
    p.inverse = inverse;
    p.out = y.mutable_data_ptr();
    params.push_back(p);
    elements += p.heads * p.features;
  }
  const auto rotary = kernels().rotary;
  parallel_for(0, elements ? args.sequences * args.rows : 0,
               ceil_div(kElementwiseGrain, std::max<int64_t>(elements, 1)), [&](int64_t begin, int64_t end) {
                 for (const RotaryParams& p : params) rotary(p, begin, end);
               });
  return out;
}

}  // namespace

TORCH_LIBRARY_IMPL(PEFT_KERNELS_NAMESPACE, CPU, m) { m.impl("rotary", rotary); }

}  // namespace peft_kernels::cpu
