// Bottleneck adapters that serve different rows: tensors to pointers, and registration. Which rows an adapter
// serves is known on the device alone, and is never read back.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include "../../common/multi_bottleneck_args.h"
#include "../core/composed.h"
#include "../core/listed_rows.h"
#include "bottleneck_view.h"
#include "multi_bottleneck.h"
#include "sort_rows.h"

namespace peft_kernels::cuda {
namespace {

using Strings = c10::List<std::string>;
using Doubles = at::ArrayRef<double>;
using Bools = c10::List<bool>;
using Tensors = std::vector<Tensor>;

// All adapters of a call, checked.
struct Adapters {
  int64_t out_features;
  std::vector<BottleneckArgs> args;
  const OptionalTensors& seed;
  int64_t ranks = 0;  // of the widest

  // x: [m, in_features].
  Adapters(const Tensor& x, int64_t out_features, const OptionalTensors& norm_weight,
           const OptionalTensors& norm_bias, at::TensorList down, at::TensorList up,
           const Strings& activation, Doubles scaling, Doubles dropout_p, const OptionalTensors& seed)
      : out_features(out_features), seed(seed) {
    for (size_t i = 0; i < down.size(); ++i) {
      args.emplace_back(x, norm_weight.get(i), norm_bias.get(i), down[i], up[i], activation.get(i),
                        scaling[i], dropout_p[i], seed.get(i));
      TORCH_CHECK(args[i].n == out_features, "up: expected shape (", out_features, ", r), got ",
                  up[i].sizes());
      ranks = std::max(ranks, args[i].r);
    }
  }

  bool are_composed(const Tensor& x) const {
    if (x.scalar_type() == at::kFloat || x.size(0) > std::numeric_limits<int>::max()) return true;
    for (const BottleneckArgs& one : args) {
      if (is_composed(one) || !takes_ranks(one.r)) return true;
    }
    return false;
  }

  // Biases are fp32, or undefined where there are none.
  MultiBottleneckView view(const Tensor& x, const GroupedRows& rows, const Tensors& down_bias = {},
                           const Tensors& up_bias = {}) const {
    MultiBottleneckView found{dtype_of(x, "x"), x.size(1), out_features, ranks, rows, {}};
    for (size_t i = 0; i < args.size(); ++i) {
      found.adapters.push_back(view_of(args[i], seed.get(i), down_bias.empty() ? Tensor() : down_bias[i],
                                       up_bias.empty() ? Tensor() : up_bias[i]));
    }
    return found;
  }
};

// Rows sorted by adapter, for the kernels that follow on this stream.
class SortedRows {
 public:
  SortedRows(const Tensor& row_group, size_t adapters)
      : order_(at::empty(row_group.sizes(), row_group.options().dtype(at::kInt))),
        ends_(at::empty({static_cast<int64_t>(adapters) + 1}, order_.options())),
        listed_(sorted(row_group), row_group.size(0), multi_bottleneck_tile_rows()) {}

  GroupedRows view() const { return {order_.const_data_ptr<int>(), listed_.view()}; }

 private:
  const Tensor& sorted(const Tensor& row_group) {
    sort_rows(row_group.const_data_ptr<int64_t>(), static_cast<int>(row_group.size(0)),
              static_cast<int>(ends_.size(0)) - 1, order_.mutable_data_ptr<int>(),
              ends_.mutable_data_ptr<int>(), current_stream());
    return ends_;
  }

  Tensor order_, ends_;
  ListedRows listed_;
};

std::tuple<Tensor, Tensor> multi_bottleneck_op(const Tensor& x_in, const OptionalTensor& residual_in,
                                               const Tensor& row_group, const OptionalTensors& norm_weight,
                                               const OptionalTensors& norm_bias, Doubles norm_eps,
                                               at::TensorList down, const OptionalTensors& down_bias,
                                               at::TensorList up, const OptionalTensors& up_bias,
                                               const Strings& activation, Doubles scaling, Doubles dropout_p,
                                               const OptionalTensors& seed) {
  const OnDeviceOf device(x_in, "x");
  const size_t count = down.size();
  check_counts(count, {norm_weight.size(), norm_bias.size(), norm_eps.size(), down_bias.size(), up.size(),
                       up_bias.size(), activation.size(), scaling.size(), dropout_p.size(), seed.size()});
  TORCH_CHECK(x_in.dim() >= 1, "x: expected at least 1 dimension, got 0");
  const Tensor x = as_rows(x_in, x_in.size(-1), "x");
  const Tensor y = at::empty((residual_in ? *residual_in : x_in).sizes(), x_in.options());
  const int64_t out_features = y.size(-1);
  check_shape(y, sizes_with_last(x_in, out_features), "residual");
  const Tensor residual = residual_in ? matching(*residual_in, y, "residual") : x;
  const Adapters adapters(x, out_features, norm_weight, norm_bias, down, up, activation, scaling, dropout_p,
                          seed);
  const Tensor groups = checked_row_group(row_group, x.size(0));
  if (adapters.are_composed(x)) {
    return composed(multi_bottleneck_op, "multi_bottleneck", x_in, residual_in, row_group, norm_weight,
                    norm_bias, norm_eps, down, down_bias, up, up_bias, activation, scaling, dropout_p, seed);
  }
  Tensors down_biases, up_biases;
  for (size_t i = 0; i < count; ++i) {
    const BottleneckArgs& one = adapters.args[i];
    down_biases.push_back(one.fp32_vector(down_bias.get(i), one.r, "down_bias"));
    up_biases.push_back(one.fp32_vector(up_bias.get(i), one.n, "up_bias"));
  }
  // Zeros in the columns that an adapter lacks.
  const Tensor z = at::zeros(sizes_with_last(x_in, adapters.ranks), x_in.options().dtype(at::kFloat));
  const SortedRows rows(groups, count);
  multi_bottleneck(adapters.view(x, rows.view(), down_biases, up_biases), x.const_data_ptr(),
                   residual.const_data_ptr(), written(z), y.mutable_data_ptr(), current_stream());
  return {y, z};
}

// The adapters as those of LoRA: their factors and rows. They share the columns of matrices between the
// GEMMs.
LoraBatch as_lora(const MultiBottleneckView& view, const Tensor& row_group) {
  LoraBatch batch{view.dtype, row_group.size(0), view.k, row_group.const_data_ptr<int64_t>(), view.ranks, {}};
  for (size_t i = 0; i < view.adapters.size(); ++i) {
    const BottleneckView& one = view.adapters[i];
    batch.adapters.push_back({one.down, one.up, one.down_dtype, one.up_dtype, one.rank, 0, 0, one.scaling,
                              static_cast<int64_t>(i), DropoutMask{nullptr, 0, 0, 1.0f}});
  }
  return batch;
}

// Gradients of one parameter of each adapter; those not needed have no elements.
struct Gradients {
  Tensors tensors;
  std::vector<void*> pointers;  // null: not needed
  bool any = false;

  void add(bool need, const Tensor& like) {
    tensors.push_back(empty_unless(need, like));
    pointers.push_back(need ? tensors.back().mutable_data_ptr() : nullptr);
    any |= need;
  }
};

// Gradients of biases: sums over the rows of each adapter, in fp32. Those not needed have no elements.
Tensors sums_by_adapter(const GroupedRows& rows, const Tensor& x, const Bools& need,
                        const std::vector<GroupSum>& wanted) {
  Tensors found;
  std::vector<GroupSum> sums = wanted;
  bool any = false;
  for (size_t i = 0; i < sums.size(); ++i) {
    found.push_back(at::empty({need[i] ? sums[i].columns : 0}, x.options().dtype(at::kFloat)));
    if (need[i]) sums[i].out = found[i].mutable_data_ptr<float>();
    any |= need[i];
  }
  if (any) sum_groups(rows, x.const_data_ptr(), dtype_of(x, "x"), x.size(1), sums, current_stream());
  return found;
}

bool any_of(const Bools& needs) {
  for (const bool need : needs) {
    if (need) return true;
  }
  return false;
}

std::tuple<Tensor, Tensors, Tensors, Tensors, Tensors, Tensors, Tensors> multi_bottleneck_backward_op(
    const Tensor& dy_in, const Tensor& x_in, const Tensor& z_in, const Tensor& row_group,
    const OptionalTensors& norm_weight, const OptionalTensors& norm_bias, Doubles norm_eps,
    at::TensorList down, at::TensorList up, const Strings& activation, Doubles scaling, Doubles dropout_p,
    const OptionalTensors& seed, bool adds_dy, bool need_dx, const Bools& need_dnorm, const Bools& need_ddown,
    const Bools& need_ddown_bias, const Bools& need_dup, const Bools& need_dup_bias) {
  const OnDeviceOf device(dy_in, "dy");
  const size_t count = down.size();
  check_counts(count, {norm_weight.size(), norm_bias.size(), norm_eps.size(), up.size(), activation.size(),
                       scaling.size(), dropout_p.size(), seed.size(), need_dnorm.size(), need_ddown.size(),
                       need_ddown_bias.size(), need_dup.size(), need_dup_bias.size()});
  TORCH_CHECK(x_in.dim() >= 1 && dy_in.dim() >= 1, "x: expected at least 1 dimension, got 0");
  const Tensor x = as_rows(x_in, x_in.size(-1), "x");
  const Adapters adapters(x, dy_in.size(-1), norm_weight, norm_bias, down, up, activation, scaling, dropout_p,
                          seed);
  check_dtype(dy_in, x.scalar_type(), "dy");
  check_shape(dy_in, sizes_with_last(x_in, adapters.out_features), "dy");
  check_dtype(z_in, at::kFloat, "z");
  check_shape(z_in, sizes_with_last(x_in, adapters.ranks), "z");
  TORCH_CHECK(!adds_dy || adapters.out_features == x.size(1), "dy: expected ", x.size(1),
              " features like x, got ", adapters.out_features);
  const Tensor groups = checked_row_group(row_group, x.size(0));
  if (adapters.are_composed(x)) {
    return composed(multi_bottleneck_backward_op, "multi_bottleneck_backward", dy_in, x_in, z_in, row_group,
                    norm_weight, norm_bias, norm_eps, down, up, activation, scaling, dropout_p, seed, adds_dy,
                    need_dx, need_dnorm, need_ddown, need_ddown_bias, need_dup, need_dup_bias);
  }
  const Tensor dy = as_rows(dy_in, adapters.out_features, "dy"), z = as_rows(z_in, adapters.ranks, "z");
  const Tensor dx = empty_unless(need_dx, x_in);
  const SortedRows sorted(groups, count);
  const GroupedRows rows = sorted.view();
  const MultiBottleneckView view = adapters.view(x, rows);
  Gradients ddown, dup;
  std::vector<GroupSum> ddown_bias, dup_bias;
  for (size_t i = 0; i < count; ++i) {
    const BottleneckArgs& one = adapters.args[i];
    ddown.add(need_ddown[i], one.down);
    dup.add(need_dup[i], one.up);
    ddown_bias.push_back({nullptr, static_cast<int>(one.r), 1.0f});
    dup_bias.push_back({nullptr, static_cast<int>(one.n), one.scaling});
  }
  Tensor value, dz;
  if (dup.any) value = at::empty_like(z);
  if (ddown.any || any_of(need_ddown_bias)) dz = at::empty_like(z);
  if (need_dx || value.defined() || dz.defined()) {
    multi_bottleneck_backward(view, dy.const_data_ptr(), read(z), adds_dy ? dy.const_data_ptr() : nullptr,
                              written(value), written(dz), need_dx ? dx.mutable_data_ptr() : nullptr,
                              current_stream());
  }
  const LoraBatch lora = as_lora(view, groups);
  if (ddown.any) {
    CallContext context;
    lora_da(lora, x.const_data_ptr(), read(dz), ddown.pointers, context);
  }
  if (dup.any) {
    CallContext context;
    lora_db(lora, {{dy.const_data_ptr(), view.n}}, read(value), dup.pointers, context);
  }
  Tensors no_norm, no_norm_bias;
  for (size_t i = 0; i < count; ++i) {
    no_norm.push_back(at::empty({0}, x.options()));
    no_norm_bias.push_back(at::empty({0}, z.options()));
  }
  return {dx,
          no_norm,
          no_norm_bias,
          ddown.tensors,
          sums_by_adapter(rows, dz.defined() ? dz : z, need_ddown_bias, ddown_bias),
          dup.tensors,
          sums_by_adapter(rows, dy, need_dup_bias, dup_bias)};
}

}  // namespace

TORCH_LIBRARY_IMPL(PEFT_KERNELS_NAMESPACE, PEFT_KERNELS_DISPATCH_KEY, m) {
  m.impl("multi_bottleneck", multi_bottleneck_op);
  m.impl("multi_bottleneck_backward", multi_bottleneck_backward_op);
}

}  // namespace peft_kernels::cuda
