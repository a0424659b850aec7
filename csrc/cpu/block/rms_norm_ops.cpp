// Ops rms_norm, add_rms_norm and rms_norm_backward.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "../core/column_sums.h"
#include "../core/namespace.h"
#include "../core/parallel.h"

namespace peft_kernels::cpu {
namespace {

// Rows over which the weight's gradients are summed at a time, whatever the number of threads.
constexpr int64_t kNormRows = 64;

struct Args {
  Tensor x, weight;  // x as rows; weight in fp32, with the offset added
  int64_t m, features;
  RmsNormParams params{};

  Args(const Tensor& x_in, const Tensor& weight_in, double offset, bool rounds) {
    dtype_of(weight_in, "weight");
    TORCH_CHECK(weight_in.dim() == 1 && weight_in.numel() > 0, "weight: expected shape (features,), got ",
                weight_in.sizes());
    features = weight_in.numel();
    x = as_rows(x_in, features, "x");
    weight = weight_in.to(at::kFloat).contiguous();
    if (offset != 0.0) weight = weight + offset;
    m = x.size(0);
    params.x = x.const_data_ptr();
    params.dtype = dtype_of(x, "x");
    params.features = features;
    params.weight = weight.const_data_ptr<float>();
    params.rounds = rounds;
  }

  // Checks and sets the dtype of the output, or of its gradient.
  void result(const Tensor& y, const char* name) {
    params.out_dtype = dtype_of(y, name);
    TORCH_CHECK(
        params.dtype == DType::kF32 || params.out_dtype == DType::kF32 || params.out_dtype == params.dtype,
        name, ": expected Float or ", x.scalar_type(), " like x, got ", y.scalar_type());
  }

  // Minimum rows per thread.
  int64_t grain() const { return ceil_div(kElementwiseGrain / 2, features); }

  // Runs the forward; returns y and rstd.
  template <class Run>
  std::tuple<Tensor, Tensor> forward(const Tensor& like, double eps, at::ScalarType dtype, const Run& run) {
    Tensor y = at::empty(like.sizes(), like.options().dtype(dtype)),
           rstd = at::empty(like.sizes().slice(0, like.dim() - 1), like.options().dtype(at::kFloat));
    result(y, "dtype");
    params.eps = static_cast<float>(eps);
    params.out = y.mutable_data_ptr();
    params.rstd = rstd.mutable_data_ptr<float>();
    parallel_for(0, m, grain(), [&](int64_t begin, int64_t end) { run(params, begin, end); });
    return {y, rstd};
  }
};

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps, double offset,
                                    bool rounds, at::ScalarType dtype) {
  return Args(x, weight, offset, rounds).forward(x, eps, dtype, kernels().rms_norm);
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm(const Tensor& x_in, const Tensor& residual_in,
                                                const Tensor& weight, double eps, double offset, bool rounds,
                                                at::ScalarType dtype) {
  check_shape(residual_in, x_in.sizes(), "residual");
  const at::ScalarType type = at::promote_types(x_in.scalar_type(), residual_in.scalar_type());
  Tensor sum = at::empty(x_in.sizes(), x_in.options().dtype(type));
  Args args(sum, weight, offset, rounds);
  // The kernel takes a 16-bit branch with an fp32 sum, but the residual must have the sum's dtype.
  const Tensor residual = as_rows(residual_in, args.features, "residual").to(type);
  const Tensor x = as_rows(x_in, args.features, "x");
  args.params.branch = x.const_data_ptr();
  args.params.branch_dtype = dtype_of(x, "x");
  args.params.residual = residual.const_data_ptr();
  args.params.sum = sum.mutable_data_ptr();
  const auto [y, rstd] = args.forward(sum, eps, dtype, kernels().add_rms_norm);
  return {y, sum, rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& dy_in, const Tensor& x, const Tensor& weight,
                                             const Tensor& rstd_in, const OptionalTensor& add_in,
                                             double offset, bool rounds, bool need_dx, bool need_dweight) {
  Args args(x, weight, offset, rounds);
  args.result(dy_in, "dy");
  check_shape(dy_in, x.sizes(), "dy");
  check_dtype(rstd_in, at::kFloat, "rstd");
  check_shape(rstd_in, x.sizes().slice(0, x.dim() - 1), "rstd");
  const Tensor dy = dy_in.contiguous(), rstd = rstd_in.contiguous();
  const Tensor add = add_in ? matching(*add_in, x, "add") : Tensor();
  Tensor dx = empty_unless(need_dx, x);
  RmsNormParams params = args.params;
  params.dy = dy.const_data_ptr();
  params.rstd = const_cast<float*>(rstd.const_data_ptr<float>());
  params.add = add_in ? add.const_data_ptr() : nullptr;
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
  m.impl("add_rms_norm", add_rms_norm);
  m.impl("rms_norm_backward", rms_norm_backward);
}

}  // namespace peft_kernels::cpu
