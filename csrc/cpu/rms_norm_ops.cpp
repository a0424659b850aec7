// Root mean square norm: tensors to pointers, and registration.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "column_sums.h"
#include "namespace.h"
#include "parallel.h"

namespace peft_kernels::cpu {
namespace {

// Rows whose gradients of the weight are summed in one go: not by threads, which must not change sums.
constexpr int64_t kNormRows = 64;

struct Args {
  Tensor x, weight;  // as rows; in fp32
  at::ScalarType out_dtype;
  int64_t m, features;
  RmsNormParams params{};

  Args(const Tensor& x_in, const Tensor& weight_in, double eps) {
    dtype_of(weight_in, "weight");
    TORCH_CHECK(weight_in.dim() == 1 && weight_in.numel() > 0, "weight: expected shape (features,), got ",
                weight_in.sizes());
    features = weight_in.numel();
    x = as_rows(x_in, features, "x");
    weight = weight_in.to(at::kFloat).contiguous();
    out_dtype = at::promote_types(x.scalar_type(), weight_in.scalar_type());
    m = x.size(0);
    params.x = x.const_data_ptr();
    params.dtype = dtype_of(x, "x");
    params.features = features;
    params.weight = weight.const_data_ptr<float>();
    params.eps = static_cast<float>(eps);
    params.out_dtype = out_dtype == x.scalar_type() ? params.dtype : DType::kF32;
  }

  // So many rows at least for each thread.
  int64_t grain() const { return ceil_div(kElementwiseGrain / 2, features); }
};

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps) {
  const Args args(x, weight, eps);
  Tensor y = at::empty(x.sizes(), x.options().dtype(args.out_dtype)),
         rstd = at::empty(x.sizes().slice(0, x.dim() - 1), x.options().dtype(at::kFloat));
  RmsNormParams params = args.params;
  params.out = y.mutable_data_ptr();
  params.rstd = rstd.mutable_data_ptr<float>();
  const auto rms_norm = kernels().rms_norm;
  parallel_for(0, args.m, args.grain(), [&](int64_t begin, int64_t end) { rms_norm(params, begin, end); });
  return {y, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& dy_in, const Tensor& x, const Tensor& weight,
                                             const Tensor& rstd_in, bool need_dx, bool need_dweight) {
  const Args args(x, weight, 0.0);
  check_dtype(dy_in, args.out_dtype, "dy");
  check_shape(dy_in, x.sizes(), "dy");
  check_dtype(rstd_in, at::kFloat, "rstd");
  check_shape(rstd_in, x.sizes().slice(0, x.dim() - 1), "rstd");
  const Tensor dy = dy_in.contiguous(), rstd = rstd_in.contiguous();
  Tensor dx = need_dx ? at::empty(x.sizes(), x.options()) : at::empty({0}, x.options());
  RmsNormParams params = args.params;
  params.dy = dy.const_data_ptr();
  params.rstd = const_cast<float*>(rstd.const_data_ptr<float>());
  params.dx = need_dx ? dx.mutable_data_ptr() : nullptr;
  const auto backward = kernels().rms_norm_backward;
  if (!need_dweight) {
    parallel_for(0, need_dx ? args.m : 0, args.grain(),
                 [&](int64_t begin, int64_t end) { backward(params, begin, end); });
    return {dx, at::empty({0}, weight.options())};
  }
  const int64_t chunks = ceil_div(args.m, kNormRows);
  Tensor sums = at::empty({chunks, args.features}, x.options().dtype(at::kFloat));
  parallel_for(0, chunks, ceil_div(args.grain(), kNormRows), [&](int64_t begin, int64_t end) {
    RmsNormParams part = params;
    for (int64_t i = begin; i < end; ++i) {
      part.sums = sums.mutable_data_ptr<float>() + i * args.features;
      backward(part, i * kNormRows, std::min((i + 1) * kNormRows, args.m));
    }
  });
  return {dx, column_sums(sums).to(weight.scalar_type())};
}

}  // namespace

TORCH_LIBRARY_IMPL(PEFT_KERNELS_NAMESPACE, CPU, m) {
  m.impl("rms_norm", rms_norm);
  m.impl("rms_norm_backward", rms_norm_backward);
}

}  // namespace peft_kernels::cpu
