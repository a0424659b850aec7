// Ops bottleneck and bottleneck_backward.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <utility>
#include <vector>

#include "../../common/autocast.h"
#include "../core/column_sums.h"
#include "../core/namespace.h"
#include "bottleneck_rows.h"

namespace peft_kernels::cpu {
namespace {

// Rows over which a norm's parameter gradients are summed at a time.
constexpr int64_t kNormRows = 64;

using Args = BottleneckArgs;

std::tuple<Tensor, Tensor> bottleneck(const Tensor& x, const OptionalTensor& residual,
                                      const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                                      double norm_eps, const Tensor& down, const OptionalTensor& down_bias,
                                      const Tensor& up, const OptionalTensor& up_bias,
                                      c10::string_view activation, double scaling, double dropout_p,
                                      const OptionalTensor& seed) {
  const WithoutAutocast without_autocast;
  const Args args(x, norm_weight, norm_bias, norm_eps, down, up, activation, scaling, dropout_p, seed);
  Tensor y = at::empty(sizes_with_last(x, args.n), x.options());
  Tensor z = at::empty(sizes_with_last(x, args.r), args.floats());
  BottleneckForward(args, residual, down_bias, up_bias, y, z).run();
  return {y, z};
}

Tensor normed_rows(const Args& args) {
  Tensor out = at::empty({args.m, args.k}, args.floats());
  const NormParams norm = args.norm();
  const auto layer_norm = kernels().layer_norm;
  parallel_for(0, args.m, ceil_div(kElementwiseGrain / 4, args.k), [&](int64_t begin, int64_t end) {
    NormParams part = norm;
    part.out = out.mutable_data_ptr<float>() + begin * args.k;
    layer_norm(part, begin, end);
  });
  return out;
}

// Returns the gradients of a norm's weight and bias from that of its output, `d`, and writes dx; dx starts
// from dy, if given.
std::tuple<Tensor, Tensor> norm_gradients(const Args& args, const Tensor& d, const void* dy, void* dx) {
  const int64_t chunks = ceil_div(args.m, kNormRows);
  Tensor sums = at::empty({chunks, 2 * args.k}, args.floats());
  NormParams norm = args.norm();
  norm.d = d.const_data_ptr<float>();
  norm.dy = dy;
  norm.dx = dx;
  const auto backward = kernels().layer_norm_backward;
  parallel_for(0, chunks, ceil_div(kElementwiseGrain / 8, args.k * kNormRows),
               [&](int64_t begin, int64_t end) {
                 Tensor buffer = at::empty({2 * args.k}, args.floats());
                 NormParams part = norm;
                 part.out = buffer.mutable_data_ptr<float>();
                 for (int64_t i = begin; i < end; ++i) {
                   part.sums = sums.mutable_data_ptr<float>() + i * 2 * args.k;
                   backward(part, i * kNormRows, std::min((i + 1) * kNormRows, args.m));
                 }
               });
  const Tensor total = column_sums(sums);
  return {total.narrow(0, 0, args.k).clone(), total.narrow(0, args.k, args.k).clone()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bottleneck_backward(
    const Tensor& dy_in, const Tensor& x, const Tensor& z_in, const OptionalTensor& norm_weight,
    const OptionalTensor& norm_bias, double norm_eps, const Tensor& down, const Tensor& up,
    c10::string_view activation, double scaling, double dropout_p, const OptionalTensor& seed, bool adds_dy,
    bool need_dx, bool need_dnorm, bool need_ddown, bool need_ddown_bias, bool need_dup, bool need_dup_bias) {
  const WithoutAutocast without_autocast;
  const Args args(x, norm_weight, norm_bias, norm_eps, down, up, activation, scaling, dropout_p, seed);
  const BottleneckGradient gradient(args, x, dy_in, z_in, adds_dy);
  const Tensor &dy = gradient.dy, &z = gradient.z;
  const auto none = [](const Tensor& like) { return at::empty({0}, like.options()); };
  const auto no_sums = [&] { return at::empty({0}, args.floats()); };
  need_dnorm &= args.has_norm();

  Tensor dx = none(x), dnorm_weight = none(args.has_norm() ? *norm_weight : x), dnorm_bias = no_sums();
  if (need_dx) dx = at::empty(x.sizes(), x.options());
  const bool down_in_pairs = args.in_pairs(args.down) && !args.has_norm(),
             up_in_pairs = args.in_pairs(args.up);
  const bool need_dz = need_dx || need_dnorm || need_ddown || need_ddown_bias;
  const bool multiplies_dx = need_dx && !args.has_norm();
  Tensor dz = at::empty({need_dz ? args.m : 0, args.r}, args.floats());
  GradientFactors down_factors(args, need_ddown, down_in_pairs), up_factors(args, need_dup, up_in_pairs);
  const DType dtype = dtype_of(x, "x");
  const int64_t threads = useful_threads(args.m * args.r * (args.n * need_dz + args.k * multiplies_dx));
  const int64_t block = block_of(args.m, threads);
  const int64_t blocks = need_dz || need_dup ? ceil_div(args.m, block) : 0;
  parallel_for(0, blocks, ceil_div(blocks, threads), [&](int64_t first, int64_t last) {
    void* scratch = checked_thread_scratch();
    HiddenBuffers hidden(args, z, block, need_dup, false);
    Tensor rounded_dz;
    if (need_dz) hidden.params.d = dz.mutable_data_ptr<float>();
    if (multiplies_dx && down_in_pairs)
      hidden.params.rounded_d = HiddenBuffers::round_into(rounded_dz, args, block);
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = i * block, end = std::min(begin + block, args.m), rows = end - begin;
      float* dz_rows = hidden.params.d ? hidden.params.d + begin * args.r : nullptr;
      if (need_dz) {
        multiply({element_ptr(dy, begin * args.n), dtype, args.up, "up", dz_rows, DType::kF32}, rows, args.m,
                 true, scratch);
      }
      kernels().bottleneck(hidden.params, begin * args.r, end * args.r);
      up_factors.put(hidden.params.value, begin, end);
      down_factors.put(dz_rows, begin, end);
      if (!multiplies_dx) continue;
      const void* d = down_in_pairs ? rounded_dz.const_data_ptr() : dz_rows;
      multiply({d, down_in_pairs ? DType::kBF16 : DType::kF32, args.down, "down",
                mutable_element_ptr(dx, begin * args.k), dtype, nullptr,
                adds_dy ? element_ptr(dy, begin * args.n) : nullptr},
               rows, args.m, true, scratch);
    }
  });

  if (args.has_norm() && (need_dx || need_dnorm)) {
    Tensor d = at::empty({args.m, args.k}, args.floats());
    Gemm gemm(d);
    gemm.add(term_of(dz, "dz", dense_matrix(args.down, "down")));
    gemm.run_nn();
    auto [d_weight, d_bias] = norm_gradients(args, d, adds_dy ? dy.const_data_ptr() : nullptr,
                                             need_dx ? dx.mutable_data_ptr() : nullptr);
    if (need_dnorm) {
      dnorm_weight = d_weight.to(norm_weight->scalar_type());
      dnorm_bias = d_bias;
    }
  }
  Tensor ddown = none(down), dup = none(up), dup_t;
  std::vector<Gemm> gemms;
  if (need_ddown) {
    ddown = at::empty_like(args.down);
    gemms.push_back(down_factors.gemm_with(args.has_norm() ? normed_rows(args) : args.x, ddown));
  }
  if (need_dup) {
    dup_t = at::empty({args.r, args.n}, args.up.options());
    gemms.push_back(up_factors.gemm_with(dy, dup_t));
  }
  Gemm::run_nn_batch(gemms);
  if (need_dup) {
    dup = at::empty_like(args.up);
    transpose(dup_t, dup);
  }
  return {dx,
          dnorm_weight,
          dnorm_bias,
          ddown,
          need_ddown_bias ? column_sums(dz) : no_sums(),
          dup,
          need_dup_bias ? column_sums(dy, args.scaling) : no_sums()};
}

}  // namespace

TORCH_LIBRARY_IMPL(PEFT_KERNELS_NAMESPACE, CPU, m) {
  m.impl("bottleneck", bottleneck);
  m.impl("bottleneck_backward", bottleneck_backward);
}

}  // namespace peft_kernels::cpu
