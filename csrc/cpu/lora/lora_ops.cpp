// The LoRA ops. The deltas of a layer are further terms of its base GEMM.
#include <ATen/ATen.h>
// First, as it is precompiled (tools/precompiled.py).

#include <vector>

#include "../../common/autocast.h"
#include "../../common/lora_ops.h"
#include "../core/namespace.h"
#include "../core/transpose.h"
#include "../linear/linear_gemm.h"
#include "lora_factors.h"

namespace peft_kernels::cpu {
namespace {

// Adds the GEMMs rows @ rhs^T of an adapter, into its columns of h (or of dh).
void add_shrunk(std::vector<Gemm>& gemms, Tensor& h, const Adapter& adapter, const Tensor& rows,
                const Tensor& rhs, float rhs_scale) {
  for (const RowRun& run : adapter.runs) {
    Gemm& gemm = gemms.emplace_back(h, run.begin, run.end, adapter.h_begin, adapter.h_end());
    gemm.add(rows_term(rows, "rows", run.begin, dense_matrix(rhs, "rhs"), rhs_scale));
    gemm.keep_alive(rows);
    gemm.keep_alive(rhs);
  }
}

// Adds `scale` times an adapter's columns of h (or of dh) times rhs, in the rows that it serves. `rounded`:
// those columns scaled and in bf16, for a GEMM in pairs; else undefined.
void add_expanded(Gemm& gemm, const Tensor& h, const Tensor& rounded, const Adapter& adapter,
                  const MatrixView& rhs, float scale, const DropoutMask& mask) {
  GemmTerm term = rounded.defined() ? term_of(rounded, "h", rhs) : term_of(h, "h", rhs, scale);
  if (rounded.defined()) {
    gemm.keep_alive(rounded);
  } else {
    term.lhs = static_cast<const float*>(term.lhs) + adapter.h_begin;
    term.depth = adapter.rank();
  }
  term.mask = mask;
  for (const RowRun& run : adapter.runs) {
    term.m_begin = run.begin;
    term.m_end = run.end;
    gemm.add(term);
  }
}

Tensor in_type(const Tensor& t, at::ScalarType dtype) { return t.scalar_type() == dtype ? t : t.to(dtype); }

// x with the elements that an adapter drops set to 0, but not scaled: exact in x's own dtype.
Tensor masked(const Tensor& x, const Adapter& adapter) {
  if (!adapter.drops()) return x;
  DropoutMask mask = adapter.mask;
  mask.scale = 1.0f;
  Tensor out = at::empty_like(x);
  run_dropout(x, mask, out);
  return out;
}

// h = x A^T of every adapter in its rows, 0 elsewhere. Same leading sizes as x.
Tensor shrink(const Tensor& x, const Tensor& rows, const Adapters& adapters, bool has_gaps) {
  const auto sizes = sizes_with_last(x, ranks_of(adapters));
  const auto options = x.options().dtype(at::kFloat);
  Tensor h = has_gaps ? at::zeros(sizes, options) : at::empty(sizes, options);
  std::vector<Gemm> gemms;
  for (const Adapter& adapter : adapters) {
    // A GEMM in pairs leaves A unscaled.
    add_shrunk(gemms, h, adapter, masked(rows, adapter), adapter.a,
               adapter.a_in_pairs ? 1.0f : adapter.mask.scale);
    if (!adapter.drops()) continue;
    Gemm::run_nt_batch(gemms);  // before the next adapter makes its own copy of x
    gemms.clear();
    if (adapter.a_in_pairs) h.narrow(-1, adapter.h_begin, adapter.rank()).mul_(adapter.mask.scale);
  }
  Gemm::run_nt_batch(gemms);
  return h;
}

// The factor still missing in dh: GEMMs in pairs leave B unscaled.
float scale_left(const Adapter& adapter) { return adapter.b_in_pairs ? adapter.scaling : 1.0f; }

// dh = scaling dY B of every adapter in its rows, up to scale_left.
Tensor shrink_gradients(const std::vector<Tensor>& dy, const Adapters& adapters, const Tensor& h) {
  Tensor dh = at::empty_like(h);
  std::vector<Gemm> gemms;
  for (const Adapter& adapter : adapters) {
    // Outside of pairs B^T is fp32 whatever the scaling: with scaling 1 a bf16 matrix would be multiplied in
    // pairs, in another order.
    const Tensor& b = adapter.b;
    Tensor bt = at::empty({b.size(1), b.size(0)}, b.options().dtype(factors_type(adapter.b_in_pairs)));
    transpose(b, bt);
    add_shrunk(gemms, dh, adapter, dy[adapter.layer], bt, adapter.b_in_pairs ? 1.0f : adapter.scaling);
  }
  Gemm::run_nt_batch(gemms);
  return dh;
}

// One layer: rows W^T + bias + the deltas of its adapters. `rows` is x as rows in the base GEMM's dtype; the
// result has x's leading sizes and dtype.
Tensor layer_forward(const Tensor& x, const Rows& rows, const BaseWeight& base, const OptionalTensor& bias,
                     size_t layer, const Adapters& adapters, const Tensor& h) {
  const auto sizes = sizes_with_last(x, base.out_features());
  const at::ScalarType compute = rows.tensor().scalar_type(), bias_dtype = bias_type(bias, compute, x);
  const int64_t m = rows_of(x);
  const bool uses_torch = base.uses_torch(m) && !has_dense_gemv(base.dense(), m);
  Tensor y;
  if (uses_torch) {
    if (bias) check_bias(*bias, base.out_features(), bias_dtype);
    y = at::linear(rows.tensor(), base.dense(), bias ? OptionalTensor(bias->to(compute)) : std::nullopt);
    y = reshaped(y.contiguous().to(x.scalar_type()), sizes);
  } else {
    y = at::empty(sizes, x.options());
  }
  Gemm gemm(y);
  if (uses_torch) {
    gemm.accumulate();
  } else {
    gemm.set_bias(bias, bias_dtype);
    gemm.add(term_of(rows.tensor(), "x", base.matrix()));
  }
  for (const Adapter& adapter : adapters) {
    if (adapter.layer != layer) continue;
    adapter.check_out_features(base.out_features());
    const LoraFactors rounded(h, adapter, adapter.scaling, at::kBFloat16, adapter.b_rounds, false);
    add_expanded(gemm, h, rounded.rows, adapter, dense_matrix(adapter.b, "lora_b"), adapter.scaling,
                 DropoutMask{});
  }
  uses_torch ? gemm.run_nt() : gemm.run_nt(rows);
  return y;
}

Tensor input_gradient(const std::vector<Tensor>& dy, const Tensor& x, const std::vector<BaseWeight>& bases,
                      const Adapters& adapters, const Tensor& dh, const std::vector<LoraFactors>& dh_factors,
                      at::ScalarType compute) {
  std::vector<Tensor> base_dy;  // dy in the base GEMMs' dtype
  for (const Tensor& d : dy) base_dy.push_back(in_type(d, compute));
  Tensor dx;
  const int64_t m = rows_of(x);
  for (size_t j = 0; j < bases.size(); ++j) {
    if (!bases[j].uses_torch(m)) continue;
    if (dx.defined()) {
      dx.addmm_(base_dy[j], bases[j].dense());
    } else {
      dx = at::mm(base_dy[j], bases[j].dense()).contiguous();
    }
  }
  const bool any_uses_torch = dx.defined();
  dx = any_uses_torch ? reshaped(dx.to(x.scalar_type()), x.sizes()) : at::empty(x.sizes(), x.options());
  Gemm gemm(dx);
  if (any_uses_torch) gemm.accumulate();
  for (size_t j = 0; j < bases.size(); ++j) {
    if (!bases[j].uses_torch(m)) gemm.add(term_of(base_dy[j], "dy", bases[j].matrix()));
  }
  for (size_t i = 0; i < adapters.size(); ++i) {
    const Adapter& adapter = adapters[i];
    DropoutMask mask = adapter.mask;
    if (dh_factors[i].rows.defined()) mask.scale = 1.0f;
    add_expanded(gemm, dh, dh_factors[i].rows, adapter, dense_matrix(adapter.a, "lora_a"),
                 scale_left(adapter), mask);
  }
  gemm.run_nn();
  return dx;
}

// Adds factors @ rows, summed over the rows that the adapter serves, into `out`, [rank, features].
void add_sums(std::vector<Gemm>& gemms, Tensor& out, const LoraFactors& factors, const Adapter& adapter,
              const Tensor& rows) {
  factors.add_sums(gemms.emplace_back(out), rows, adapter.runs);
}

class Layers {
 public:
  using Base = BaseWeight;

  Layers(const Tensor& x, std::vector<AdapterArgs> args, const OptionalTensor& seed,
         const OptionalTensor& row_group, at::ScalarType compute)
      : x_(x),
        rows_(as_rows(x, x.size(-1), "x")),
        adapters_(adapters_of(x, std::move(args), seed, row_group)),
        has_gaps_(row_group.has_value()),
        compute_(compute) {}

  LoraForward forward(const std::vector<BaseWeight>& bases, const std::vector<OptionalTensor>& bias) const {
    const Rows rows(in_type(rows_, compute_));
    LoraForward out;
    out.h = shrink(x_, rows_, adapters_, has_gaps_);
    for (size_t j = 0; j < bases.size(); ++j) {
      out.y.push_back(layer_forward(x_, rows, bases[j], bias[j], j, adapters_, out.h));
    }
    return out;
  }

  LoraGradients backward(const std::vector<Tensor>& dy, const Tensor& h, const std::vector<BaseWeight>& bases,
                         bool need_dx, const std::vector<bool>& need_da,
                         const std::vector<bool>& need_db) const {
    for (const Adapter& adapter : adapters_) adapter.check_out_features(dy[adapter.layer].size(1));
    bool need_dh = need_dx;
    for (const bool need : need_da) need_dh |= need;
    const Tensor dh = need_dh ? shrink_gradients(dy, adapters_, h) : Tensor();
    const auto none = [](const Tensor& t) { return at::empty({0}, t.options()); };
    LoraGradients out;
    std::vector<LoraFactors> dh_factors;
    for (size_t i = 0; i < adapters_.size() && need_dh; ++i) {
      const Adapter& adapter = adapters_[i];
      dh_factors.emplace_back(dh, adapter, scale_left(adapter) * adapter.mask.scale,
                              factors_type(adapter.a_rounds), need_dx && adapter.a_rounds, need_da[i]);
    }
    out.dx = need_dx ? input_gradient(dy, x_, bases, adapters_, dh, dh_factors, compute_) : none(x_);
    std::vector<Gemm> gemms;
    std::vector<Tensor> transposed(adapters_.size());
    for (size_t i = 0; i < adapters_.size(); ++i) {
      const Adapter& adapter = adapters_[i];
      const Tensor &a = adapter.a, &b = adapter.b;
      out.da.push_back(need_da[i] ? at::empty_like(a) : none(a));
      if (need_da[i]) {
        add_sums(gemms, out.da[i], dh_factors[i], adapter, masked(rows_, adapter));
        if (adapter.drops()) {
          Gemm::run_nn_batch(gemms);  // before the next adapter makes its own copy of x
          gemms.clear();
        }
      }
      out.db.push_back(need_db[i] ? at::empty_like(b) : none(b));
      if (need_db[i]) {
        transposed[i] = at::empty({b.size(1), b.size(0)}, b.options());
        const LoraFactors h_factors(h, adapter, adapter.scaling, factors_type(adapter.b_rounds), false, true);
        add_sums(gemms, transposed[i], h_factors, adapter, dy[adapter.layer]);
      }
    }
    Gemm::run_nn_batch(gemms);
    for (size_t i = 0; i < adapters_.size(); ++i) {
      if (need_db[i]) transpose(transposed[i], out.db[i]);
    }
    return out;
  }

 private:
  const WithoutAutocast without_autocast_;
  const Tensor& x_;
  const Tensor rows_;
  const Adapters adapters_;
  const bool has_gaps_;  // some rows have no adapter
  const at::ScalarType compute_;
};

}  // namespace

TORCH_LIBRARY_IMPL(PEFT_KERNELS_NAMESPACE, CPU, m) { LoraOps<Layers>::implement(m); }

}  // namespace peft_kernels::cpu
