// The expert linear ops: one GEMM per expert that has rows, all in one list of tasks. Each GEMM sums in the
// same order as the ops of a single layer.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "../../common/autocast.h"
#include "../core/namespace.h"
#include "../linear/linear_gemm.h"
#include "../lora/lora_adapters.h"
#include "../lora/lora_factors.h"
#include "experts_args.h"
#include "experts_matrices.h"

namespace peft_kernels::cpu {
namespace {

using Runs = std::vector<ExpertRows>;

Tensor rows_of_run(const Tensor& t, const ExpertRows& run) { return t.narrow(0, run.begin, run.count()); }

// The GEMM of a run, written to its rows of out.
Gemm& gemm_of(std::vector<Gemm>& gemms, Tensor& out, const ExpertRows& run) {
  return gemms.emplace_back(out, run.begin, run.end, 0, out.size(1));
}

std::vector<Gemm> reserve_gemms(const Runs& runs) {
  std::vector<Gemm> gemms;
  gemms.reserve(runs.size());
  return gemms;
}

// h of all rows, or its gradient, as GEMM operands: rounded for the runs where a single layer with that many
// rows would round (rounds_factors), else in fp32.
class Hidden {
 public:
  // `scale` applies in every GEMM. `matrix`: the experts' matrices that h is multiplied by, or whose gradient
  // it is a factor of.
  Hidden(const Tensor& h, const Runs& runs, const Tensor& x, const Tensor& matrix, float scale,
         bool wants_rows, bool wants_columns)
      : h_(h), scale_(scale) {
    std::vector<RowRun> rounded, floats;
    rounds_.reserve(runs.size());
    for (const ExpertRows& run : runs) {
      rounds_.push_back(rounds_factors(x, matrix, run.count()));
      (rounds_.back() ? rounded : floats).push_back({run.begin, run.end});
    }
    const int64_t rank = h.size(1);
    if (!rounded.empty()) {
      rounded_.emplace(h, 0, rank, rounded, scale, at::kBFloat16, wants_rows, wants_columns);
    }
    // The fp32 rows are those of h.
    if (!floats.empty()) floats_.emplace(h, 0, rank, floats, scale, at::kFloat, false, wants_columns);
  }

  GemmTerm rows(size_t i, const ExpertRows& run, const MatrixView& rhs) const {
    return rounds_[i] ? rows_term(rounded_->rows, "h", run.begin, rhs)
                      : rows_term(h_, "h", run.begin, rhs, scale_);
  }
  const LoraFactors& columns(size_t i) const { return rounds_[i] ? *rounded_ : *floats_; }

 private:
  const Tensor& h_;
  float scale_;
  std::vector<bool> rounds_;  // by run
  std::optional<LoraFactors> rounded_, floats_;
};

// What an adapter adds: h times its second matrix.
struct Delta {
  const Hidden& hidden;
  const ExpertMatrices& matrices;

  GemmTerm term(const Runs& runs, size_t i) const { return hidden.rows(i, runs[i], matrices[i]); }
};

// rows @ weight^T + bias + delta, per expert.
Tensor forward(const Tensor& x, const Runs& runs, const ExpertWeights& weights, const ExpertBias& bias,
               int64_t out_features, const Delta* delta) {
  Tensor y = at::empty({x.size(0), out_features}, x.options());
  std::vector<Gemm> ours = reserve_gemms(runs), after_torch;
  for (size_t i = 0; i < runs.size(); ++i) {
    const ExpertRows& run = runs[i];
    const bool uses_torch = weights.uses_torch_forward(run.count());
    Gemm& gemm = gemm_of(uses_torch ? after_torch : ours, y, run);
    if (uses_torch) {
      OptionalTensor b = bias.tensor_of(run.expert);
      if (b) b = b->to(x.scalar_type());
      rows_of_run(y, run).copy_(at::linear(rows_of_run(x, run), weights.dense(run.expert), b));
      gemm.accumulate();
    } else {
      gemm.set_bias(bias.of(run.expert), bias.dtype());
      gemm.add(rows_term(x, "x", run.begin, weights.matrix(run.expert)));
    }
    if (delta) gemm.add(delta->term(runs, i));
  }
  Gemm::run_packed_nt_batch(ours, x.options());
  if (delta) Gemm::run_nt_batch(after_torch);
  zero_remaining_rows(y, runs);
  return y;
}

// rows @ weight + delta, per expert.
Tensor backward_to_rows(const Tensor& dy, const Runs& runs, const ExpertWeights& weights, int64_t in_features,
                        const Delta* delta) {
  Tensor dx = at::empty({dy.size(0), in_features}, dy.options());
  std::vector<Gemm> gemms = reserve_gemms(runs);
  for (size_t i = 0; i < runs.size(); ++i) {
    const ExpertRows& run = runs[i];
    Gemm& gemm = gemm_of(gemms, dx, run);
    if (weights.uses_torch(run.count())) {
      rows_of_run(dx, run).copy_(at::mm(rows_of_run(dy, run), weights.dense(run.expert)));
      gemm.accumulate();
    } else {
      gemm.add(rows_term(dy, "dy", run.begin, weights.matrix(run.expert)));
    }
    if (delta) gemm.add(delta->term(runs, i));
  }
  Gemm::run_nn_batch(gemms);
  zero_remaining_rows(dx, runs);
  return dx;
}

// [rows, r]: rows @ matrix^T, per expert. Rows without an expert are left uninitialised.
Tensor shrink(const Tensor& rows, const char* name, const Runs& runs, const ExpertMatrices& matrices,
              int64_t rank, float scale) {
  Tensor h = at::empty({rows.size(0), rank}, rows.options().dtype(at::kFloat));
  std::vector<Gemm> gemms = reserve_gemms(runs);
  for (size_t i = 0; i < runs.size(); ++i) {
    gemm_of(gemms, h, runs[i]).add(rows_term(rows, name, runs[i].begin, matrices[i], scale));
  }
  Gemm::run_nt_batch(gemms);
  return h;
}

// Adds h^T @ rows, summed over the rows of each run, into matrix index[run] of `out`, [.., rank, features].
void add_sums(std::vector<Gemm>& gemms, const Hidden& hidden, const Tensor& rows, const Runs& runs,
              Tensor& out, const std::vector<int64_t>& index) {
  const int64_t rank = out.size(1);
  for (size_t i = 0; i < runs.size(); ++i) {
    Gemm& gemm = gemms.emplace_back(out, index[i] * rank, (index[i] + 1) * rank, 0, rows.size(1));
    hidden.columns(i).add_sums(gemm, rows, {{runs[i].begin, runs[i].end}});
  }
}

Tensor experts_linear(const Tensor& x, const Tensor& ends, const Tensor& packed, const Tensor& absmax,
                      const OptionalTensor& absmax2, const OptionalTensor& offset, int64_t layout,
                      int64_t out_features, const OptionalTensor& bias) {
  TORCH_CHECK(out_features >= 0, "out_features: expected 0 or more, got ", out_features);
  const Tensor rows = expert_activation(x, "x");
  const Runs runs = expert_rows(ends, rows.size(0));
  const int64_t experts = ends.size(0);
  const ExpertWeights weights(packed, absmax, absmax2, offset, layout, experts, out_features, rows.size(1),
                              x.scalar_type());
  const ExpertBias biases(bias, experts, out_features, x.scalar_type());
  return forward(rows, runs, weights, biases, out_features, nullptr);
}

Tensor experts_linear_dx(const Tensor& dy, const Tensor& ends, const Tensor& packed, const Tensor& absmax,
                         const OptionalTensor& absmax2, const OptionalTensor& offset, int64_t layout,
                         int64_t in_features) {
  TORCH_CHECK(in_features >= 0, "in_features: expected 0 or more, got ", in_features);
  const Tensor rows = expert_activation(dy, "dy");
  const Runs runs = expert_rows(ends, rows.size(0));
  const ExpertWeights weights(packed, absmax, absmax2, offset, layout, ends.size(0), rows.size(1),
                              in_features, dy.scalar_type());
  return backward_to_rows(rows, runs, weights, in_features, nullptr);
}

std::tuple<Tensor, Tensor> experts_lora_linear(const Tensor& x, const Tensor& ends, const Tensor& weight,
                                               const OptionalTensor& absmax, const OptionalTensor& absmax2,
                                               const OptionalTensor& offset, int64_t layout,
                                               const OptionalTensor& bias, const Tensor& lora_a,
                                               const Tensor& lora_b, double scaling) {
  const WithoutAutocast without_autocast;
  const Tensor rows = expert_activation(x, "x");
  const Runs runs = expert_rows(ends, rows.size(0));
  const int64_t experts = ends.size(0);
  check_experts_adapters(lora_a, lora_b, rows, experts);
  const int64_t out_features = lora_b.size(1);
  const ExpertWeights weights(weight, absmax, absmax2, offset, layout, experts, out_features, rows.size(1),
                              x.scalar_type());
  const ExpertBias biases(bias, experts, out_features, x.scalar_type());
  const ExpertMatrices a(lora_a, runs, lora_a.scalar_type(), "lora_a");
  const ExpertMatrices b(lora_b, runs, lora_b.scalar_type(), "lora_b");
  Tensor h = shrink(rows, "x", runs, a, lora_a.size(1), 1.0f);
  zero_remaining_rows(h, runs);
  const Hidden hidden(h, runs, rows, lora_b, static_cast<float>(scaling), true, false);
  const Delta delta{hidden, b};
  return {forward(rows, runs, weights, biases, out_features, &delta), h};
}

std::tuple<Tensor, Tensor, Tensor> experts_lora_linear_backward(
    const Tensor& dy, const Tensor& x, const Tensor& h, const Tensor& ends, const Tensor& weight,
    const OptionalTensor& absmax, const OptionalTensor& absmax2, const OptionalTensor& offset, int64_t layout,
    const Tensor& lora_a, const Tensor& lora_b, double scaling, bool need_dx, bool need_da, bool need_db) {
  const WithoutAutocast without_autocast;
  const Tensor rows = expert_activation(x, "x");
  const Runs runs = expert_rows(ends, rows.size(0));
  const int64_t experts = ends.size(0);
  check_experts_adapters(lora_a, lora_b, rows, experts);
  const int64_t rank = lora_a.size(1), out_features = lora_b.size(1);
  check_dtype(dy, x.scalar_type(), "dy");
  check_shape(dy, {rows.size(0), out_features}, "dy");
  check_dtype(h, at::kFloat, "h");
  check_shape(h, {rows.size(0), rank}, "h");
  const ExpertWeights weights(weight, absmax, absmax2, offset, layout, experts, out_features, rows.size(1),
                              x.scalar_type());
  const Tensor gradients = dy.contiguous();
  const auto none = [](const Tensor& t) { return at::empty({0}, t.options()); };
  Tensor dh, dx = none(x), da = none(lora_a), db = none(lora_b);
  const float scale = static_cast<float>(scaling);
  std::optional<Hidden> dh_factors;
  if (need_dx || need_da) {
    // In pairs B is left unscaled; else B is fp32 whatever the scaling, as in the single-layer op.
    const bool pairs = in_pairs(rows, lora_b);
    const ExpertMatrices bt(lora_b.transpose(1, 2), runs, factors_type(pairs), "lora_b");
    dh = shrink(gradients, "dy", runs, bt, rank, pairs ? 1.0f : scale);
    dh_factors.emplace(dh, runs, rows, lora_a, pairs ? scale : 1.0f, need_dx, need_da);
  }
  if (need_dx) {
    const ExpertMatrices a(lora_a, runs, lora_a.scalar_type(), "lora_a");
    const Delta delta{*dh_factors, a};
    dx = backward_to_rows(gradients, runs, weights, rows.size(1), &delta);
  }
  std::vector<Gemm> gemms;
  gemms.reserve(2 * runs.size());
  if (need_da) {
    da = new_gradient(lora_a, runs);
    add_sums(gemms, *dh_factors, rows, runs, da, experts_of(runs));
  }
  Tensor dbt;
  if (need_db) {
    const Tensor floats = h.contiguous();
    dbt = at::empty({static_cast<int64_t>(runs.size()), rank, out_features}, lora_b.options());
    const Hidden h_factors(floats, runs, rows, lora_b, scale, false, true);
    add_sums(gemms, h_factors, gradients, runs, dbt, index_range(runs.size()));
  }
  Gemm::run_nn_batch(gemms);
  if (need_db) db = transposed_gradient(dbt, lora_b, runs);
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
