// The ops with LoRA adapters: tensors to pointers, and registration.
//
// All of them are one thing here: linear layers that share x, each with any number of adapters. The deltas of
// a layer are further terms of its base product.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "../common/lora_args.h"
#include "dropout.h"
#include "linear_product.h"
#include "weights.h"

namespace peft_kernels::cpu {
namespace {

// Rows that an adapter serves.
struct RowRun {
  int64_t begin, end;
};

struct Adapter : AdapterArgs {
  DropoutMask mask;
  std::vector<RowRun> runs;

  Adapter(AdapterArgs args, const OptionalTensor& seed, std::vector<RowRun> runs)
      : AdapterArgs(std::move(args)), mask(mask_of(dropout, seed, a.size(1))), runs(std::move(runs)) {}
};

using Adapters = std::vector<Adapter>;

// Columns [column, column + depth) of lhs, in the rows of a run, times rhs.
GemmTerm column_term(const Tensor& lhs, int64_t column, int64_t depth, const RowRun& run,
                     const MatrixView& rhs, float rhs_scale = 1.0f) {
  GemmTerm term = term_of(lhs, "h", rhs, rhs_scale);
  term.lhs = static_cast<const float*>(term.lhs) + column;
  term.depth = depth;
  term.m_begin = run.begin;
  term.m_end = run.end;
  return term;
}

// Columns [run.begin, run.end) of lhs times those rows of rhs: a sum over rows of a batch.
GemmTerm row_term(const Tensor& lhs, const RowRun& run, const Tensor& rhs) {
  GemmTerm term = term_of(lhs, "lhs", dense_matrix(rhs, "rhs"));
  term.lhs = static_cast<const float*>(term.lhs) + run.begin;
  term.rhs.data =
      static_cast<const char*>(rhs.const_data_ptr()) + run.begin * rhs.size(-1) * rhs.element_size();
  term.depth = run.end - run.begin;
  return term;
}

// x with the elements dropped that an adapter's mask drops, not yet scaled: exact in x's own type.
Tensor masked(const Tensor& x, const Adapter& adapter) {
  if (!adapter.drops()) return x;
  DropoutMask mask = adapter.mask;
  mask.scale = 1.0f;
  Tensor out = at::empty_like(x);
  run_dropout(x, mask, out);
  return out;
}

// h[m, ranks] = x A^T of every adapter in its rows, 0 elsewhere.
Tensor down_products(const Tensor& x, const Adapters& adapters, int64_t ranks, bool has_gaps) {
  const auto options = x.options().dtype(at::kFloat);
  Tensor h = has_gaps ? at::zeros({x.size(0), ranks}, options) : at::empty({x.size(0), ranks}, options);
  std::vector<Tensor> kept;  // what the products point into
  std::vector<Product> products;
  for (const Adapter& adapter : adapters) {
    const Tensor rows = masked(x, adapter);
    kept.push_back(rows);
    for (const RowRun& run : adapter.runs) {
      Product& product = products.emplace_back(h, run.begin, run.end, adapter.h_begin, adapter.h_end());
      GemmTerm term = term_of(rows, "x", dense_matrix(adapter.a, "lora_a"), adapter.mask.scale);
      term.lhs = static_cast<const char*>(term.lhs) + run.begin * rows.size(1) * rows.element_size();
      product.add(term);
    }
    if (!adapter.drops()) continue;
    Product::run_nt_together(products);  // before the next makes its own copy of x
    products.clear();
    kept.clear();
  }
  Product::run_nt_together(products);
  return h;
}

// Of one layer: rows W^T + bias + the deltas of its adapters, with x as rows in the type of the base product.
// Leading sizes and type as x's.
Tensor layer_forward(const Tensor& x, const Rows& rows, const BaseWeight& base, const OptionalTensor& bias,
                     size_t layer, const Adapters& adapters, const Tensor& h) {
  const auto add_deltas = [&](Product& product) {
    for (const Adapter& adapter : adapters) {
      if (adapter.layer != layer) continue;
      adapter.check_out_features(base.out_features());
      for (const RowRun& run : adapter.runs) {
        product.add(column_term(h, adapter.h_begin, adapter.rank(), run, dense_matrix(adapter.b, "lora_b"),
                                adapter.scaling));
      }
    }
  };
  const auto sizes = sizes_with_last(x, base.out_features());
  const at::ScalarType compute = rows.tensor().scalar_type();
  if (base.is_torchs(rows_of(x))) {
    OptionalTensor base_bias = bias;
    if (bias) {
      check_bias(*bias, base.out_features(), bias_type(bias, compute, x));
      base_bias = bias->to(compute);
    }
    Tensor y = at::linear(rows.tensor(), base.dense(), base_bias).contiguous().to(x.scalar_type());
    Product product(y);
    product.start_from_out();
    add_deltas(product);
    product.run_nt();
    return reshaped(y, sizes);
  }
  Tensor y = at::empty(sizes, x.options());
  Product product(y);
  product.start_from(bias, bias_type(bias, compute, x));
  product.add(term_of(rows.tensor(), "x", base.matrix()));
  add_deltas(product);
  product.run_nt(rows);
  return y;
}

struct Gradients {
  Tensor dx;
  std::vector<Tensor> da, db;
};

// dh[m, ranks] = scaling dY B of every adapter in its rows.
Tensor up_gradients(const std::vector<Tensor>& dy, const Adapters& adapters, const Tensor& h) {
  Tensor dh = at::empty_like(h);
  std::vector<Tensor> kept;  // what the products point into
  std::vector<Product> products;
  for (const Adapter& adapter : adapters) {
    const Tensor scaled_bt = adapter.b.to(at::kFloat).mul(adapter.scaling).t().contiguous();
    kept.push_back(scaled_bt);
    const Tensor& d = dy[adapter.layer];
    for (const RowRun& run : adapter.runs) {
      Product& product = products.emplace_back(dh, run.begin, run.end, adapter.h_begin, adapter.h_end());
      GemmTerm term = term_of(d, "dy", dense_matrix(scaled_bt, "lora_b"));
      term.lhs = static_cast<const char*>(term.lhs) + run.begin * d.size(1) * d.element_size();
      product.add(term);
    }
  }
  Product::run_nt_together(products);
  return dh;
}

Tensor input_gradient(const std::vector<Tensor>& dy, const Tensor& x, const std::vector<BaseWeight>& bases,
                      const Adapters& adapters, const Tensor& dh, at::ScalarType compute) {
  std::vector<Tensor> of_base;  // dy for the base products
  for (const Tensor& d : dy) of_base.push_back(d.to(compute));
  Tensor dx;
  const int64_t m = rows_of(x);
  for (size_t j = 0; j < bases.size(); ++j) {
    if (!bases[j].is_torchs(m)) continue;
    if (dx.defined()) {
      dx.addmm_(of_base[j], bases[j].dense());
    } else {
      dx = at::mm(of_base[j], bases[j].dense()).contiguous();
    }
  }
  const bool any_torchs = dx.defined();
  dx = any_torchs ? dx.to(x.scalar_type()) : at::empty_like(x);
  Product product(dx);
  if (any_torchs) product.start_from_out();
  for (size_t j = 0; j < bases.size(); ++j) {
    if (!bases[j].is_torchs(m)) product.add(term_of(of_base[j], "dy", bases[j].matrix()));
  }
  for (const Adapter& adapter : adapters) {
    for (const RowRun& run : adapter.runs) {
      GemmTerm term =
          column_term(dh, adapter.h_begin, adapter.rank(), run, dense_matrix(adapter.a, "lora_a"));
      term.mask = adapter.mask;
      product.add(term);
    }
  }
  product.run_nn();
  return dx;
}

// The rank is the short side of dA and dB: it takes the place of the batch, and features stay contiguous.
Tensor sum_over_rows(const Tensor& factors, const Tensor& rows, const std::vector<RowRun>& runs) {
  const Tensor transposed = factors.t().contiguous();  // [r, m]
  Tensor out = at::empty({transposed.size(0), rows.size(1)}, transposed.options());
  Product product(out);
  for (const RowRun& run : runs) product.add(row_term(transposed, run, rows));
  product.run_nn();
  return out;
}

Gradients backward(const std::vector<Tensor>& dy, const Tensor& x, const Tensor& h,
                   const std::vector<BaseWeight>& bases, const Adapters& adapters, at::ScalarType compute,
                   bool need_dx, const std::vector<bool>& need_da, const std::vector<bool>& need_db) {
  for (const Adapter& adapter : adapters) {
    adapter.check_out_features(dy[adapter.layer].size(1));
  }
  Gradients out;
  out.dx = at::empty({0}, x.options());
  bool any_da = false;
  for (const bool need : need_da) any_da |= need;
  Tensor dh;
  if (need_dx || any_da) dh = up_gradients(dy, adapters, h);
  if (need_dx) out.dx = input_gradient(dy, x, bases, adapters, dh, compute);
  for (size_t i = 0; i < adapters.size(); ++i) {
    const Adapter& adapter = adapters[i];
    Tensor da = at::empty({0}, adapter.a.options()), db = at::empty({0}, adapter.b.options());
    if (need_da[i]) {
      const Tensor factors = dh.slice(1, adapter.h_begin, adapter.h_end()).mul(adapter.mask.scale);
      da = sum_over_rows(factors, masked(x, adapter), adapter.runs).to(da.scalar_type());
    }
    if (need_db[i]) {
      const Tensor factors = h.slice(1, adapter.h_begin, adapter.h_end()).mul(adapter.scaling);
      db = sum_over_rows(factors, dy[adapter.layer], adapter.runs).t().to(db.scalar_type()).contiguous();
    }
    out.da.push_back(da);
    out.db.push_back(db);
  }
  return out;
}

// One layer, one adapter.

Adapters one_adapter(const Tensor& x, AdapterArgs args, const OptionalTensor& seed) {
  Adapters adapters;
  adapters.emplace_back(std::move(args), seed, std::vector<RowRun>{{0, rows_of(x)}});
  return adapters;
}

std::tuple<Tensor, Tensor> lora_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& absmax,
                                       const OptionalTensor& absmax2, const OptionalTensor& offset,
                                       int64_t blocksize, const OptionalTensor& bias, const Tensor& lora_a,
                                       const Tensor& lora_b, double scaling, double dropout_p,
                                       const OptionalTensor& seed, const OptionalDtype& compute_dtype) {
  const at::ScalarType compute = compute_type(compute_dtype, x);
  const Adapters adapters =
      one_adapter(x, one_adapter_args(x, lora_a, lora_b, scaling, dropout_p, seed), seed);
  const Adapter& adapter = adapters[0];
  const Tensor x_rows = as_rows(x, adapter.a.size(1), "x");
  const Rows rows(x_rows.to(compute));
  const BaseWeight base(weight, absmax, absmax2, offset, blocksize, adapter.b.size(0), adapter.a.size(1),
                        compute);
  const Tensor h = down_products(x_rows, adapters, adapter.rank(), false);
  Tensor y = layer_forward(x, rows, base, bias, 0, adapters, h);
  return {y, reshaped(h, sizes_with_last(x, adapter.rank()))};
}

std::tuple<Tensor, Tensor, Tensor> lora_linear_backward(
    const Tensor& dy, const Tensor& x, const Tensor& h, const Tensor& weight, const OptionalTensor& absmax,
    const OptionalTensor& absmax2, const OptionalTensor& offset, int64_t blocksize, const Tensor& lora_a,
    const Tensor& lora_b, double scaling, double dropout_p, const OptionalTensor& seed,
    const OptionalDtype& compute_dtype, bool need_dx, bool need_da, bool need_db) {
  const at::ScalarType compute = compute_type(compute_dtype, x);
  const Adapters adapters =
      one_adapter(x, one_adapter_args(x, lora_a, lora_b, scaling, dropout_p, seed), seed);
  const Adapter& adapter = adapters[0];
  check_shape(dy, sizes_with_last(x, adapter.b.size(0)), "dy");
  std::vector<BaseWeight> bases;
  bases.emplace_back(weight, absmax, absmax2, offset, blocksize, adapter.b.size(0), adapter.a.size(1),
                     compute);
  Gradients g =
      backward({gradient_rows(dy, x)}, as_rows(x, adapter.a.size(1), "x"), h_rows(h, x, adapter.rank()),
               bases, adapters, compute, need_dx, {need_da}, {need_db});
  return {need_dx ? reshaped(g.dx, x.sizes()) : g.dx, g.da[0], g.db[0]};
}

// Several layers, any number of adapters.

// The rows of each group, as runs of equal neighbours.
std::vector<RowRun> runs_of(int64_t group, const OptionalTensor& row_group, int64_t rows) {
  if (!row_group) return {{0, rows}};
  const int64_t* groups = row_group->const_data_ptr<int64_t>();
  std::vector<RowRun> runs;
  for (int64_t m = 0; m < rows;) {
    const int64_t begin = m;
    while (m < rows && groups[m] == groups[begin]) ++m;
    if (groups[begin] == group) runs.push_back({begin, m});
  }
  return runs;
}

Adapters all_adapters(const Tensor& x, std::vector<AdapterArgs> args, const OptionalTensor& seed,
                      const OptionalTensor& row_group) {
  OptionalTensor groups = row_group;
  if (row_group) groups = row_group->contiguous();
  Adapters adapters;
  adapters.reserve(args.size());
  for (AdapterArgs& adapter : args) {
    std::vector<RowRun> runs = runs_of(adapter.group, groups, rows_of(x));
    adapters.emplace_back(std::move(adapter), seed, std::move(runs));
  }
  return adapters;
}

std::tuple<std::vector<Tensor>, Tensor> multi_lora_linear(
    const Tensor& x, at::TensorList weight, const OptionalTensors& absmax, const OptionalTensors& absmax2,
    const OptionalTensors& offset, at::IntArrayRef blocksize, at::IntArrayRef out_features,
    at::TensorList bias, at::TensorList lora_a, at::TensorList lora_b, at::IntArrayRef layer,
    at::ArrayRef<double> scaling, at::ArrayRef<double> dropout_p, const OptionalTensor& seed,
    at::IntArrayRef group, const OptionalTensor& row_group, const OptionalDtype& compute_dtype) {
  const at::ScalarType compute = compute_type(compute_dtype, x);
  const Adapters adapters = all_adapters(
      x,
      all_adapter_args(x, lora_a, lora_b, layer, scaling, dropout_p, seed, group, row_group, weight.size()),
      seed, row_group);
  const std::vector<BaseWeight> bases =
      all_bases<BaseWeight>(x, weight, absmax, absmax2, offset, blocksize, out_features, compute);
  TORCH_CHECK(bias.size() == bases.size(), "bias: expected ", bases.size(), " like weight, got ",
              bias.size());
  const Tensor x_rows = as_rows(x, x.size(-1), "x");
  const Rows rows(x_rows.to(compute));
  const int64_t ranks = ranks_of(adapters);
  const Tensor h = down_products(x_rows, adapters, ranks, row_group.has_value());
  std::vector<Tensor> y;
  for (size_t j = 0; j < bases.size(); ++j) {
    y.push_back(layer_forward(x, rows, bases[j], optional_bias(bias[j]), j, adapters, h));
  }
  return {y, reshaped(h, sizes_with_last(x, ranks))};
}

std::tuple<Tensor, std::vector<Tensor>, std::vector<Tensor>> multi_lora_linear_backward(
    at::TensorList dy, const Tensor& x, const Tensor& h, at::TensorList weight, const OptionalTensors& absmax,
    const OptionalTensors& absmax2, const OptionalTensors& offset, at::IntArrayRef blocksize,
    at::TensorList lora_a, at::TensorList lora_b, at::IntArrayRef layer, at::ArrayRef<double> scaling,
    at::ArrayRef<double> dropout_p, const OptionalTensor& seed, at::IntArrayRef group,
    const OptionalTensor& row_group, const OptionalDtype& compute_dtype, bool need_dx,
    const c10::List<bool>& need_da, const c10::List<bool>& need_db) {
  const at::ScalarType compute = compute_type(compute_dtype, x);
  TORCH_CHECK(dy.size() == weight.size(), "dy: expected ", weight.size(), " like weight, got ", dy.size());
  TORCH_CHECK(need_da.size() == lora_a.size() && need_db.size() == lora_a.size(),
              "need_da, need_db: expected ", lora_a.size(), " of each like lora_a, got ", need_da.size(),
              ", ", need_db.size());
  const Adapters adapters = all_adapters(
      x,
      all_adapter_args(x, lora_a, lora_b, layer, scaling, dropout_p, seed, group, row_group, weight.size()),
      seed, row_group);
  const int64_t ranks = ranks_of(adapters);
  std::vector<int64_t> out_features;
  std::vector<Tensor> dy_rows;
  for (const Tensor& d : dy) {
    dy_rows.push_back(gradient_rows(d, x));
    out_features.push_back(d.size(-1));
  }
  const std::vector<BaseWeight> bases =
      all_bases<BaseWeight>(x, weight, absmax, absmax2, offset, blocksize, out_features, compute);
  Gradients g = backward(dy_rows, as_rows(x, x.size(-1), "x"), h_rows(h, x, ranks), bases, adapters, compute,
                         need_dx, {need_da.begin(), need_da.end()}, {need_db.begin(), need_db.end()});
  return {need_dx ? reshaped(g.dx, x.sizes()) : g.dx, g.da, g.db};
}

}  // namespace

TORCH_LIBRARY_IMPL(peft_kernels_cpu, CPU, m) {
  m.impl("lora_linear", lora_linear);
  m.impl("lora_linear_backward", lora_linear_backward);
  m.impl("multi_lora_linear", multi_lora_linear);
  m.impl("multi_lora_linear_backward", multi_lora_linear_backward);
}

}  // namespace peft_kernels::cpu
