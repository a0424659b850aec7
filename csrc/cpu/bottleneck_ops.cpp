// Bottleneck adapters: tensors to pointers, and registration.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <tuple>
#include <utility>

#include "../common/autocast.h"
#include "../common/gated_args.h"
#include "dropout.h"
#include "linear_product.h"
#include "namespace.h"
#include "weights.h"

namespace peft_kernels::cpu {
namespace {

// Rows that go through the bottleneck together: what lies between the products stays in L2.
constexpr int64_t kMostRows = 128;
// Rows whose gradients of a norm are summed in one go.
constexpr int64_t kNormRows = 64;

// What both directions take.
struct Args {
  Tensor x;  // [m, k]
  Tensor norm_weight, norm_bias;
  float norm_eps;
  Tensor down;  // [r, k]
  Tensor up;    // [n, r]
  Activation activation;
  float scaling;
  DropoutMask mask;
  int64_t m, k, r, n;

  Args(const Tensor& x_in, const OptionalTensor& norm_weight_in, const OptionalTensor& norm_bias_in,
       double norm_eps, const Tensor& down_in, const Tensor& up_in, c10::string_view activation_name,
       double scaling, double dropout_p, const OptionalTensor& seed)
      : norm_eps(static_cast<float>(norm_eps)),
        activation(activation_of(activation_name)),
        scaling(static_cast<float>(scaling)) {
    TORCH_CHECK(down_in.dim() == 2, "down: expected 2 dimensions, got ", down_in.dim());
    TORCH_CHECK(up_in.dim() == 2, "up: expected 2 dimensions, got ", up_in.dim());
    r = down_in.size(0);
    k = down_in.size(1);
    n = up_in.size(0);
    TORCH_CHECK(r > 0 && k > 0, "down: expected elements, got ", down_in.sizes());
    check_shape(up_in, {n, r}, "up");
    x = as_rows(x_in, k, "x");
    m = x.size(0);
    down = parameter(down_in, "down");
    up = parameter(up_in, "up");
    norm_weight = vector(norm_weight_in, k, "norm_weight");
    norm_bias = vector(norm_bias_in, k, "norm_bias");
    TORCH_CHECK(norm_weight.defined() || !norm_bias.defined(), "norm_bias: expected a norm_weight beside it");
    mask = mask_of(dropout_of(dropout_p, seed, 0), seed, r);
  }

  bool has_norm() const { return norm_weight.defined(); }
  at::TensorOptions floats() const { return x.options().dtype(at::kFloat); }

  // A small parameter in fp32; undefined where there is none.
  Tensor vector(const OptionalTensor& t, int64_t size, const char* name) const {
    if (!t) return Tensor();
    check_shape(*t, {size}, name);
    return parameter(*t, name).to(at::kFloat);
  }

  NormParams norm() const {
    NormParams params{};
    params.x = x.const_data_ptr();
    params.dtype = dtype_of(x, "x");
    params.features = k;
    params.weight = norm_weight.const_data_ptr<float>();
    params.bias = norm_bias.defined() ? norm_bias.const_data_ptr<float>() : nullptr;
    params.eps = norm_eps;
    return params;
  }

 private:
  Tensor parameter(const Tensor& t, const char* name) const {
    dtype_of(t, name);
    TORCH_CHECK(t.scalar_type() == at::kFloat || t.scalar_type() == x.scalar_type(), name,
                ": expected Float or ", x.scalar_type(), ", got ", t.scalar_type());
    return t.contiguous();
  }
};

const float* data_of(const Tensor& t) { return t.defined() ? t.const_data_ptr<float>() : nullptr; }

// out = rows . rhs^T + bias, all of rows in one task.
void multiply(const GemmTerm& term, const float* bias, int64_t rows, int64_t n, float* out, void* scratch) {
  GemmParams params{};
  params.terms = &term;
  params.term_count = 1;
  params.bias = bias;
  params.bias_dtype = DType::kF32;
  params.out = out;
  params.out_dtype = DType::kF32;
  params.out_ld = n;
  params.m = rows;
  params.n = n;
  kernels().gemm_nt(params, {0, rows, 0, n}, scratch);
}

GemmTerm rows_times(const void* rows, DType dtype, const Tensor& rhs, const char* name, float scale) {
  const int64_t depth = rhs.size(-1);
  return {rows, dtype, depth, dense_matrix(rhs, name), scale, depth, 0, INT64_MAX, DropoutMask{}};
}

std::tuple<Tensor, Tensor> bottleneck(const Tensor& x, const OptionalTensor& residual_in,
                                      const OptionalTensor& norm_weight, const OptionalTensor& norm_bias,
                                      double norm_eps, const Tensor& down, const OptionalTensor& down_bias_in,
                                      const Tensor& up, const OptionalTensor& up_bias_in,
                                      c10::string_view activation, double scaling, double dropout_p,
                                      const OptionalTensor& seed) {
  const WithoutAutocast without_autocast;
  const Args args(x, norm_weight, norm_bias, norm_eps, down, up, activation, scaling, dropout_p, seed);
  const Tensor down_bias = args.vector(down_bias_in, args.r, "down_bias");
  Tensor up_bias = args.vector(up_bias_in, args.n, "up_bias");
  if (up_bias.defined()) up_bias = up_bias * args.scaling;
  Tensor y = at::empty(sizes_with_last(x, args.n), x.options());
  Tensor z = at::empty(sizes_with_last(x, args.r), args.floats());
  TORCH_CHECK(residual_in || args.n == args.k, "up: expected ", args.k, " rows like x has features, got ",
              args.n);
  const Tensor residual = residual_in ? matching(*residual_in, y, "residual") : args.x;

  const DType dtype = dtype_of(args.x, "x");
  const int64_t threads = useful_threads(args.m * args.r * (args.k + args.n));
  // Rows do not depend on each other: how they are cut changes no bit.
  const int64_t block = std::clamp<int64_t>(ceil_div(ceil_div(args.m, threads), 16) * 16, 16, kMostRows);
  const int64_t blocks = ceil_div(args.m, block);
  parallel_for(0, blocks, ceil_div(blocks, threads), [&](int64_t first, int64_t last) {
    void* scratch = checked_thread_scratch();
    Tensor value = at::empty({block * args.r}, args.floats()),
           delta = at::empty({block * args.n}, args.floats()),
           normed = at::empty({args.has_norm() ? block * args.k : 0}, args.floats());
    BottleneckParams middle{z.const_data_ptr<float>(), args.activation, args.mask,
                            value.mutable_data_ptr<float>(), nullptr};
    const ResidualParams sum{residual.const_data_ptr(), dtype, delta.const_data_ptr<float>(),
                             y.mutable_data_ptr()};
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = i * block, end = std::min(begin + block, args.m), rows = end - begin;
      const void* in =
          static_cast<const char*>(args.x.const_data_ptr()) + begin * args.k * args.x.element_size();
      DType in_dtype = dtype;
      if (args.has_norm()) {
        NormParams norm = args.norm();
        norm.out = normed.mutable_data_ptr<float>();
        kernels().layer_norm(norm, begin, end);
        in = norm.out;
        in_dtype = DType::kF32;
      }
      multiply(rows_times(in, in_dtype, args.down, "down", 1.0f), data_of(down_bias), rows, args.r,
               z.mutable_data_ptr<float>() + begin * args.r, scratch);
      kernels().bottleneck(middle, begin * args.r, end * args.r);
      multiply(rows_times(middle.value, DType::kF32, args.up, "up", args.scaling), data_of(up_bias), rows,
               args.n, delta.mutable_data_ptr<float>(), scratch);
      kernels().add_residual(sum, begin * args.n, end * args.n);
    }
  });
  return {y, z};
}

// rows^T . other: [features of rows, features of other], summed over all rows in fp32.
Tensor outer(const Tensor& rows, const Tensor& other, float scale) {
  Tensor factors = rows.t().contiguous();
  if (scale != 1.0f) factors.mul_(scale);
  Tensor out = at::empty({rows.size(1), other.size(1)}, rows.options());
  Product product(out);
  product.add(term_of(factors, "factors", dense_matrix(other, "rows")));
  product.run_nn();
  return out;
}

// Sums over rows, in an order that no number of threads changes.
Tensor column_sums(const Tensor& t) {
  const int64_t rows = t.size(0), columns = t.size(1);
  Tensor out = at::empty({columns}, t.options());
  const float* from = t.const_data_ptr<float>();
  float* to = out.mutable_data_ptr<float>();
  parallel_for(0, columns, ceil_div(kElementwiseGrain, std::max<int64_t>(rows, 1)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t c = begin; c < end; ++c) {
                   double sum = 0.0;
                   for (int64_t i = 0; i < rows; ++i) sum += from[i * columns + c];
                   to[c] = static_cast<float>(sum);
                 }
               });
  return out;
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

// The gradients of a norm's input, weight and bias from that of its output, `d`; dx starts from dy, if there
// is one.
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
                 Tensor room = at::empty({2 * args.k}, args.floats());
                 NormParams part = norm;
                 part.out = room.mutable_data_ptr<float>();
                 for (int64_t i = begin; i < end; ++i) {
                   part.sums = sums.mutable_data_ptr<float>() + i * 2 * args.k;
                   backward(part, i * kNormRows, std::min((i + 1) * kNormRows, args.m));
                 }
               });
  const Tensor total = column_sums(sums);
  return {total.narrow(0, 0, args.k).clone(), total.narrow(0, args.k, args.k).clone()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> bottleneck_backward(
    const Tensor& dy_in, const Tensor& x, const Tensor& z_in, const OptionalTensor& norm_weight,
    const OptionalTensor& norm_bias, double norm_eps, const Tensor& down, const Tensor& up,
    c10::string_view activation, double scaling, double dropout_p, const OptionalTensor& seed, bool adds_dy,
    bool need_dx, bool need_dnorm, bool need_ddown, bool need_ddown_bias, bool need_dup) {
  const WithoutAutocast without_autocast;
  const Args args(x, norm_weight, norm_bias, norm_eps, down, up, activation, scaling, dropout_p, seed);
  check_dtype(dy_in, x.scalar_type(), "dy");
  check_shape(dy_in, sizes_with_last(x, args.n), "dy");
  const Tensor dy = as_rows(dy_in, args.n, "dy");
  check_dtype(z_in, at::kFloat, "z");
  check_shape(z_in, sizes_with_last(x, args.r), "z");
  const Tensor z = as_rows(z_in, args.r, "z");
  TORCH_CHECK(!adds_dy || args.n == args.k, "up: expected ", args.k, " rows like x has features, got ",
              args.n);
  const auto none = [](const Tensor& like) { return at::empty({0}, like.options()); };
  const auto no_sums = [&] { return at::empty({0}, args.floats()); };
  need_dnorm &= args.has_norm();

  // dz, in the place of the gradient of what the activation and dropout give.
  const bool need_dz = need_dx || need_dnorm || need_ddown || need_ddown_bias;
  Tensor dz = at::empty({need_dz ? args.m : 0, args.r}, args.floats());
  if (need_dz) {
    const Tensor up_t = args.up.to(at::kFloat).t().contiguous();  // in fp32 whatever the scaling, as for LoRA
    Product product(dz);
    product.add(term_of(dy, "dy", dense_matrix(up_t, "up"), args.scaling));
    product.run_nt();
  }
  Tensor value = at::empty({need_dup ? args.m : 0, args.r}, args.floats());
  const BottleneckParams middle{z.const_data_ptr<float>(), args.activation, args.mask,
                                need_dup ? value.mutable_data_ptr<float>() : nullptr,
                                need_dz ? dz.mutable_data_ptr<float>() : nullptr};
  const auto bottleneck = kernels().bottleneck;
  parallel_for(0, need_dup || need_dz ? args.m * args.r : 0, kElementwiseGrain / 8,
               [&](int64_t begin, int64_t end) {
                 BottleneckParams part = middle;
                 if (part.value) part.value += begin;
                 bottleneck(part, begin, end);
               });

  Tensor dx = none(x), dnorm_weight = none(args.has_norm() ? *norm_weight : x), dnorm_bias = no_sums();
  if (need_dx) dx = at::empty(x.sizes(), x.options());
  if (args.has_norm() && (need_dx || need_dnorm)) {
    Tensor d = at::empty({args.m, args.k}, args.floats());
    Product product(d);
    product.add(term_of(dz, "dz", dense_matrix(args.down, "down")));
    product.run_nn();
    auto [d_weight, d_bias] = norm_gradients(args, d, adds_dy ? dy.const_data_ptr() : nullptr,
                                             need_dx ? dx.mutable_data_ptr() : nullptr);
    if (need_dnorm) {
      dnorm_weight = d_weight.to(norm_weight->scalar_type());
      dnorm_bias = d_bias;
    }
  } else if (need_dx) {
    Product product(dx);
    if (adds_dy) {
      dx.copy_(dy_in);
      product.start_from_out();
    }
    product.add(term_of(dz, "dz", dense_matrix(args.down, "down")));
    product.run_nn();
  }
  const Tensor ddown =
      need_ddown ? outer(dz, args.has_norm() ? normed_rows(args) : args.x, 1.0f).to(args.down.scalar_type())
                 : none(down);
  const Tensor dup =
      need_dup ? outer(value, dy, args.scaling).t().to(args.up.scalar_type()).contiguous() : none(up);
  return {dx, dnorm_weight, dnorm_bias, ddown, need_ddown_bias ? column_sums(dz) : no_sums(), dup};
}

}  // namespace

TORCH_LIBRARY_IMPL(PEFT_KERNELS_NAMESPACE, CPU, m) {
  m.impl("bottleneck", bottleneck);
  m.impl("bottleneck_backward", bottleneck_backward);
}

}  // namespace peft_kernels::cpu
