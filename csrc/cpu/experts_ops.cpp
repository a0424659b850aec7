// The linear layers of experts: a product for each expert that has rows, all in one list of tasks. What a
// product sums is what the ops of a single layer sum, in the same order.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "../common/autocast.h"
#include "experts_args.h"
#include "experts_matrices.h"
#include "linear_product.h"
#include "namespace.h"

namespace peft_kernels::cpu {
namespace {

using Runs = std::vector<ExpertRows>;

// Rows of lhs from `begin`.
GemmTerm rows_term(const Tensor& lhs, const char* name, int64_t begin, const MatrixView& rhs,
                   float rhs_scale = 1.0f) {
  GemmTerm term = term_of(lhs, name, rhs, rhs_scale);
  term.lhs =
      static_cast<const char*>(term.lhs) + begin * term.lhs_ld * static_cast<int64_t>(lhs.element_size());
  return term;
}

Tensor rows_of_run(const Tensor& t, const ExpertRows& run) {
  return t.narrow(0, run.begin, run.end - run.begin);
}

// The product of a run, into its rows of out.
Product& product_of(std::vector<Product>& products, Tensor& out, const ExpertRows& run) {
  return products.emplace_back(out, run.begin, run.end, 0, out.size(1));
}

std::vector<Product> room_for(const Runs& runs) {
  std::vector<Product> products;
  products.reserve(runs.size());
  return products;
}

// What an adapter adds: its hidden values, of all rows, and what they are multiplied by.
struct Delta {
  const Tensor& hidden;
  const ExpertMatrices& matrices;
  float scale;

  GemmTerm term(const Runs& runs, size_t i) const {
    return rows_term(hidden, "h", runs[i].begin, matrices[i], scale);
  }
};

// Rows times their expert's weight, transposed, plus its bias and delta.
Tensor forward(const Tensor& x, const Runs& runs, const ExpertWeights& weights, const ExpertBias& bias,
               int64_t out_features, const Delta* delta) {
  Tensor y = at::empty({x.size(0), out_features}, x.options());
  std::vector<Product> ours = room_for(runs), on_torchs;
  for (size_t i = 0; i < runs.size(); ++i) {
    const ExpertRows& run = runs[i];
    const bool is_torchs = weights.is_torchs(run.end - run.begin);
    Product& product = product_of(is_torchs ? on_torchs : ours, y, run);
    if (is_torchs) {
      OptionalTensor b = bias.tensor_of(run.expert);
      if (b) b = b->to(x.scalar_type());
      rows_of_run(y, run).copy_(at::linear(rows_of_run(x, run), weights.dense(run.expert), b));
      product.start_from_out();
    } else {
      product.start_from(bias.of(run.expert), bias.dtype());
      product.add(rows_term(x, "x", run.begin, weights.matrix(run.expert)));
    }
    if (delta) product.add(delta->term(runs, i));
  }
  Product::run_packed_nt_together(ours, x.options());
  if (delta) Product::run_nt_together(on_torchs);
  clear_rest(y, runs);
  return y;
}

// Rows times their expert's weight, plus its delta.
Tensor backward_to_rows(const Tensor& dy, const Runs& runs, const ExpertWeights& weights, int64_t in_features,
                        const Delta* delta) {
  Tensor dx = at::empty({dy.size(0), in_features}, dy.options());
  std::vector<Product> products = room_for(runs);
  for (size_t i = 0; i < runs.size(); ++i) {
    const ExpertRows& run = runs[i];
    Product& product = product_of(products, dx, run);
    if (weights.is_torchs(run.end - run.begin)) {
      rows_of_run(dx, run).copy_(at::mm(rows_of_run(dy, run), weights.dense(run.expert)));
      product.start_from_out();
    } else {
      product.add(rows_term(dy, "dy", run.begin, weights.matrix(run.expert)));
    }
    if (delta) product.add(delta->term(runs, i));
  }
  Product::run_nn_together(products);
  clear_rest(dx, runs);
  return dx;
}

// [rows, r]: rows times their expert's matrix, transposed. Rows that no expert has are left as they are.
Tensor shrink(const Tensor& rows, const char* name, const Runs& runs, const ExpertMatrices& matrices,
              int64_t rank, float scale) {
  Tensor h = at::empty({rows.size(0), rank}, rows.options().dtype(at::kFloat));
  std::vector<Product> products = room_for(runs);
  for (size_t i = 0; i < runs.size(); ++i) {
    product_of(products, h, runs[i]).add(rows_term(rows, name, runs[i].begin, matrices[i], scale));
  }
  Product::run_nt_together(products);
  return h;
}

// Hidden values times `scale`, transposed: those of a run are [rank, rows of it].
Tensor factors_of(const Tensor& h, const Runs& runs, float scale) {
  Tensor factors = at::empty({h.numel()}, h.options());
  const float* from = h.const_data_ptr<float>();
  float* to = factors.mutable_data_ptr<float>();
  const int64_t rank = h.size(1), rows = runs.empty() ? 0 : runs.back().end;
  parallel_for(0, rows, ceil_div(kElementwiseGrain, std::max<int64_t>(rank, 1)),
               [&](int64_t begin, int64_t end) {
                 for (const ExpertRows& run : runs) {
                   const int64_t first = std::max(begin, run.begin), last = std::min(end, run.end);
                   float* part = to + rank * run.begin;
                   const int64_t ld = run.end - run.begin;
                   for (int64_t r = 0; r < rank; ++r) {
                     for (int64_t m = first; m < last; ++m) {
                       part[r * ld + m - run.begin] = from[m * rank + r] * scale;
                     }
                   }
                 }
               });
  return factors;
}

// Hidden values by rows, summed over the rows of each run, into the matrix of `out`, [.., rank, features],
// that `index` says.
void sum_over_rows(const Tensor& h, const Tensor& rows, const Runs& runs, float scale, Tensor& out,
                   const std::vector<int64_t>& index) {
  const Tensor factors = factors_of(h, runs, scale);
  const int64_t rank = h.size(1), features = rows.size(1);
  const MatrixView all = dense_matrix(rows, "rows");
  std::vector<Product> products = room_for(runs);
  for (size_t i = 0; i < runs.size(); ++i) {
    const ExpertRows& run = runs[i];
    GemmTerm term{};
    term.lhs = factors.const_data_ptr<float>() + rank * run.begin;
    term.lhs_dtype = DType::kF32;
    term.lhs_ld = term.depth = run.end - run.begin;
    term.rhs = all;
    term.rhs.data =
        static_cast<const char*>(all.data) + run.begin * features * static_cast<int64_t>(rows.element_size());
    term.rhs_scale = 1.0f;
    term.m_end = rank;
    products.emplace_back(out, index[i] * rank, (index[i] + 1) * rank, 0, features).add(term);
  }
  Product::run_nn_together(products);
}

void check_adapter(const Tensor& t, at::ScalarType dtype, const char* name) {
  dtype_of(t, name);
  TORCH_CHECK(t.dim() == 3, name, ": expected 3 dimensions, got ", t.dim());
  TORCH_CHECK(t.scalar_type() == at::kFloat || t.scalar_type() == dtype, name, ": expected Float or ", dtype,
              ", got ", t.scalar_type());
}

void check_adapters(const Tensor& a, const Tensor& b, const Tensor& x, int64_t experts) {
  check_adapter(a, x.scalar_type(), "lora_a");
  check_adapter(b, x.scalar_type(), "lora_b");
  check_shape(a, {experts, a.size(1), x.size(1)}, "lora_a");
  check_shape(b, {experts, b.size(1), a.size(1)}, "lora_b");
}

Tensor experts_linear(const Tensor& x, const Tensor& ends, const Tensor& packed, const Tensor& absmax,
                      const OptionalTensor& absmax2, const OptionalTensor& offset, int64_t blocksize,
                      int64_t out_features, const OptionalTensor& bias) {
  TORCH_CHECK(out_features >= 0, "out_features: expected 0 or more, got ", out_features);
  const Tensor rows = expert_activation(x, "x");
  const Runs runs = expert_rows(ends, rows.size(0));
  const int64_t experts = ends.size(0);
  const ExpertWeights weights(packed, absmax, absmax2, offset, blocksize, experts, out_features, rows.size(1),
                              x.scalar_type());
  const ExpertBias biases(bias, experts, out_features, x.scalar_type());
  return forward(rows, runs, weights, biases, out_features, nullptr);
}

Tensor experts_linear_dx(const Tensor& dy, const Tensor& ends, const Tensor& packed, const Tensor& absmax,
                         const OptionalTensor& absmax2, const OptionalTensor& offset, int64_t blocksize,
                         int64_t in_features) {
  TORCH_CHECK(in_features >= 0, "in_features: expected 0 or more, got ", in_features);
  const Tensor rows = expert_activation(dy, "dy");
  const Runs runs = expert_rows(ends, rows.size(0));
  const ExpertWeights weights(packed, absmax, absmax2, offset, blocksize, ends.size(0), rows.size(1),
                              in_features, dy.scalar_type());
  return backward_to_rows(rows, runs, weights, in_features, nullptr);
}

std::tuple<Tensor, Tensor> experts_lora_linear(const Tensor& x, const Tensor& ends, const Tensor& weight,
                                               const OptionalTensor& absmax, const OptionalTensor& absmax2,
                                               const OptionalTensor& offset, int64_t blocksize,
                                               const OptionalTensor& bias, const Tensor& lora_a,
                                               const Tensor& lora_b, double scaling) {
  const WithoutAutocast without_autocast;
  const Tensor rows = expert_activation(x, "x");
  const Runs runs = expert_rows(ends, rows.size(0));
  const int64_t experts = ends.size(0);
  check_adapters(lora_a, lora_b, rows, experts);
  const int64_t out_features = lora_b.size(1);
  const ExpertWeights weights(weight, absmax, absmax2, offset, blocksize, experts, out_features, rows.size(1),
                              x.scalar_type());
  const ExpertBias biases(bias, experts, out_features, x.scalar_type());
  const ExpertMatrices a(lora_a, runs, "lora_a"), b(lora_b, runs, "lora_b");
  Tensor h = shrink(rows, "x", runs, a, lora_a.size(1), 1.0f);
  clear_rest(h, runs);
  const Delta delta{h, b, static_cast<float>(scaling)};
  return {forward(rows, runs, weights, biases, out_features, &delta), h};
}

std::tuple<Tensor, Tensor, Tensor> experts_lora_linear_backward(
    const Tensor& dy, const Tensor& x, const Tensor& h, const Tensor& ends, const Tensor& weight,
    const OptionalTensor& absmax, const OptionalTensor& absmax2, const OptionalTensor& offset,
    int64_t blocksize, const Tensor& lora_a, const Tensor& lora_b, double scaling, bool need_dx, bool need_da,
    bool need_db) {
  const WithoutAutocast without_autocast;
  const Tensor rows = expert_activation(x, "x");
  const Runs runs = expert_rows(ends, rows.size(0));
  const int64_t experts = ends.size(0);
  check_adapters(lora_a, lora_b, rows, experts);
  const int64_t rank = lora_a.size(1), out_features = lora_b.size(1);
  check_dtype(dy, x.scalar_type(), "dy");
  check_shape(dy, {rows.size(0), out_features}, "dy");
  check_dtype(h, at::kFloat, "h");
  check_shape(h, {rows.size(0), rank}, "h");
  const ExpertWeights weights(weight, absmax, absmax2, offset, blocksize, experts, out_features, rows.size(1),
                              x.scalar_type());
  const Tensor gradients = dy.contiguous();
  const auto none = [](const Tensor& t) { return at::empty({0}, t.options()); };
  Tensor dh, dx = none(x), da = none(lora_a), db = none(lora_b);
  if (need_dx || need_da) {
    // In fp32 whatever the scaling, as in the op of a single layer.
    const ExpertMatrices bt(transposed_floats(lora_b, runs));
    dh = shrink(gradients, "dy", runs, bt, rank, static_cast<float>(scaling));
  }
  if (need_dx) {
    const ExpertMatrices a(lora_a, runs, "lora_a");
    const Delta delta{dh, a, 1.0f};
    dx = backward_to_rows(gradients, runs, weights, rows.size(1), &delta);
  }
  if (need_da) {
    da = new_gradient(lora_a, runs);
    sum_over_rows(dh, rows, runs, 1.0f, da, experts_of(runs));
  }
  if (need_db) {
    const int64_t count = static_cast<int64_t>(runs.size());
    Tensor dbt = at::empty({count, rank, out_features}, lora_b.options());
    sum_over_rows(h.contiguous(), gradients, runs, static_cast<float>(scaling), dbt, numbers_to(runs.size()));
    db = transposed_gradient(dbt, lora_b, runs);
  }
  return {dx, da, db};
}

}  // namespace

TORCH_LIBRARY_IMPL(PEFT_KERNELS_NAMESPACE, CPU, m) {
  m.impl("experts_linear", experts_linear);
  m.impl("experts_linear_dx", experts_linear_dx);
  m.impl("experts_lora_linear", experts_lora_linear);
  m.impl("experts_lora_linear_backward", experts_lora_linear_backward);
}

}  // namespace peft_kernels::cpu
