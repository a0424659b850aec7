// Ops rms_norm, add_rms_norm and rms_norm_backward.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>

#include "../../common/rms_norm_args.h"
#include "../core/column_sums.h"
#include "../core/namespace.h"
#include "../core/parallel.h"

namespace peft_kernels::cpu {
namespace {

// Rows over which the weight's gradients are summed at a time, whatever the number of threads.
constexpr int64_t kNormRows = 64;

// As the kernels take them: the weight in fp32, with the offset added.
struct Call {
  Tensor weight;
  RmsNormParams params{};

  Call(const RmsNormArgs& args, double offset, bool rounds) : weight(args.weight.to(at::kFloat)) {
    if (offset != 0.0) weight = weight + offset;
    params.x = args.x.const_data_ptr();
    params.dtype = args.dtype;
    params.features = args.features;
    params.weight = weight.const_data_ptr<float>();
    params.rounds = rounds;
  }

  // Minimum rows per thread.
  int64_t grain() const { return ceil_div(kElementwiseGrain / 2, params.features); }

  template <class Run>
  void forward(const RmsNormArgs& args, const RmsNormResults& results, double eps, const Run& run) {
    params.eps = static_cast<float>(eps);
    params.out = results.y.mutable_data_ptr();
    params.out_dtype = results.dtype;
    params.rstd = results.rstd.mutable_data_ptr<float>();
    parallel_for(0, args.m, grain(), [&](int64_t begin, int64_t end) { run(params, begin, end); });
  }
};

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Tensor& weight, double eps, double offset,
                                    bool rounds, at::ScalarType dtype) {
  const RmsNormArgs args(x, weight);
  const RmsNormResults results(args, x, dtype);
  Call(args, offset, rounds).forward(args, results, eps, kernels().rms_norm);
  return {results.y, results.rstd};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm(const Tensor& x_in, const Tensor& residual_in,
                                                const Tensor& weight, double eps, double offset, bool rounds,
                                                at::ScalarType dtype) {
  check_shape(residual_in, x_in.sizes(), "residual");
  const at::ScalarType type = at::promote_types(x_in.scalar_type(), residual_in.scalar_type());
  Tensor sum = at::empty(x_in.sizes(), x_in.options().dtype(type));
  const RmsNormArgs args(sum, weight);
  const RmsNormResults results(args, sum, dtype);
  // The kernel takes a 16-bit branch with an fp32 sum, but the residual must have the sum's dtype.
  const Tensor residual = as_rows(residual_in, args.features, "residual").to(type);
  const Tensor x = as_rows(x_in, args.features, "x");
  Call call(args, offset, rounds);
  call.params.branch = x.const_data_ptr();
  call.params.branch_dtype = dtype_of(x, "x");
  call.params.residual = residual.const_data_ptr();
  call.params.sum = sum.mutable_data_ptr();
  call.forward(args, results, eps, kernels().add_rms_norm);
  return {results.y, sum, results.rstd};
}

std::tuple<Tensor, Tensor> rms_norm_backward(const Tensor& dy, const Tensor& x, const Tensor& weight,
                                             const Tensor& rstd, const OptionalTensor& add, double offset,
                                             bool rounds, bool need_dx, bool need_dweight) {
  const RmsNormGradientArgs args(dy, x, weight, rstd, add);
  const Call call(args, offset, rounds);
  Tensor dx = empty_unless(need_dx, x);
  RmsNormParams params = call.params;
  params.out_dtype = args.dy_dtype;
  params.dy = args.dy.const_data_ptr();
  params.rstd = const_cast<float*>(args.rstd.const_data_ptr<float>());
  params.add = add ? args.add.const_data_ptr() : nullptr;
  params.dx = need_dx ? dx.mutable_data_ptr() : nullptr;
  const auto backward = kernels().rms_norm_backward;
  if (!need_dweight) {
    parallel_for(0, need_dx ? args.m : 0, call.grain(),
                 [&](int64_t begin, int64_t end) { backward(params, begin, end); });
    return {dx, at::empty({0}, weight.options())};
  }
  const int64_t chunks = ceil_div(args.m, kNormRows);
  Tensor sums = at::empty({chunks, args.features}, x.options().dtype(at::kFloat));
  parallel_for(0, chunks, ceil_div(call.grain(), kNormRows), [&](int64_t begin, int64_t end) {
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
