// Op multi_bottleneck: bottleneck adapters that serve different rows. The rows of each adapter are gathered,
// and computed as in op bottleneck.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <cstring>
#include <deque>
#include <string>
#include <tuple>
#include <vector>

#include "../../common/autocast.h"
#include "../../common/multi_bottleneck_args.h"
#include "../core/namespace.h"
#include "bottleneck_rows.h"

namespace peft_kernels::cpu {
namespace {

// The rows of each group; rows that belong to none come last.
std::vector<std::vector<int64_t>> rows_by_group(const Tensor& row_group, int64_t rows, int64_t groups) {
  const Tensor group = checked_row_group(row_group, rows);
  const int64_t* row_groups = group.const_data_ptr<int64_t>();
  std::vector<std::vector<int64_t>> found(groups + 1);
  for (int64_t row = 0; row < rows; ++row) {
    found[row_groups[row] >= 0 && row_groups[row] < groups ? row_groups[row] : groups].push_back(row);
  }
  return found;
}

Tensor gathered(const Tensor& t, const std::vector<int64_t>& rows) {
  const int64_t columns = t.size(1);
  Tensor out = at::empty({static_cast<int64_t>(rows.size()), columns}, t.options());
  const size_t bytes = columns * t.element_size();
  for (size_t i = 0; i < rows.size(); ++i) {
    std::memcpy(mutable_element_ptr(out, i * columns), element_ptr(t, rows[i] * columns), bytes);
  }
  return out;
}

// Into rows of `out` with `columns` elements, which may be more than t's.
void scatter(const Tensor& t, const std::vector<int64_t>& rows, Tensor& out, int64_t columns) {
  const size_t bytes = t.size(1) * t.element_size();
  for (size_t i = 0; i < rows.size(); ++i) {
    std::memcpy(mutable_element_ptr(out, rows[i] * columns), element_ptr(t, i * t.size(1)), bytes);
  }
}

// One adapter and its rows.
struct Served {
  const std::vector<int64_t>& rows;
  BottleneckArgs args;
  Tensor y, z;
  BottleneckForward forward;

  template <class... Parameters>
  Served(const std::vector<int64_t>& rows, const OptionalTensor& residual, int64_t out_features,
         const OptionalTensor& down_bias, const OptionalTensor& up_bias, const Parameters&... parameters)
      : rows(rows),
        args(parameters...),
        y(at::empty({args.m, out_features}, args.x.options())),
        z(at::empty({args.m, args.r}, args.floats())),
        forward(args, residual, down_bias, up_bias, y, z) {}
};

std::tuple<Tensor, Tensor> multi_bottleneck(const Tensor& x_in, const OptionalTensor& residual_in,
                                            const Tensor& row_group, const OptionalTensors& norm_weight,
                                            const OptionalTensors& norm_bias, at::ArrayRef<double> norm_eps,
                                            at::TensorList down, const OptionalTensors& down_bias,
                                            at::TensorList up, const OptionalTensors& up_bias,
                                            const c10::List<std::string>& activation,
                                            at::ArrayRef<double> scaling, at::ArrayRef<double> dropout_p,
                                            const OptionalTensors& seed) {
  const WithoutAutocast without_autocast;
  const size_t count = down.size();
  check_counts(count, {norm_weight.size(), norm_bias.size(), norm_eps.size(), down_bias.size(), up.size(),
                       up_bias.size(), activation.size(), scaling.size(), dropout_p.size(), seed.size()});
  TORCH_CHECK(x_in.dim() >= 1, "x: expected at least 1 dimension, got 0");
  const Tensor x = as_rows(x_in, x_in.size(-1), "x");
  Tensor y = at::empty((residual_in ? *residual_in : x_in).sizes(), x_in.options());
  const int64_t out_features = y.size(-1);
  check_shape(y, sizes_with_last(x_in, out_features), "residual");
  const Tensor residual =
      residual_in ? as_rows(matching(*residual_in, y, "residual"), out_features, "residual") : x;
  int64_t max_rank = 0;
  for (const Tensor& one : down) max_rank = std::max(max_rank, one.size(0));
  Tensor z = at::zeros(sizes_with_last(x_in, max_rank), x_in.options().dtype(at::kFloat));

  const auto rows = rows_by_group(row_group, x.size(0), count);
  std::deque<Served> served;  // keeps references to its elements valid
  int64_t multiply_adds = 0;
  for (size_t i = 0; i < count; ++i) {
    if (rows[i].empty()) continue;
    TORCH_CHECK(up[i].dim() == 2 && up[i].size(0) == out_features, "up: expected shape (", out_features,
                ", r), got ", up[i].sizes());
    const OptionalTensor gathered_residual =
        residual_in ? OptionalTensor(gathered(residual, rows[i])) : std::nullopt;
    served.emplace_back(rows[i], gathered_residual, out_features, down_bias.get(i), up_bias.get(i),
                        gathered(x, rows[i]), norm_weight.get(i), norm_bias.get(i), norm_eps[i], down[i],
                        up[i], activation.get(i), scaling[i], dropout_p[i], seed.get(i));
    multiply_adds += served.back().forward.multiply_adds();
  }
  const auto run = [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      served[i].forward.run();
      scatter(served[i].y, served[i].rows, y, out_features);
      scatter(served[i].z, served[i].rows, z, max_rank);
    }
  };
  const int64_t runs = served.size(), threads = useful_threads(multiply_adds);
  if (runs < threads) {
    run(0, runs);  // each on all threads
  } else {
    parallel_for(0, runs, ceil_div(runs, threads), run);
  }
  const std::vector<int64_t>& unserved = rows[count];
  for (const int64_t row : unserved) {
    std::memcpy(mutable_element_ptr(y, row * out_features), element_ptr(residual, row * out_features),
                out_features * y.element_size());
  }
  return {y, z};
}

}  // namespace

TORCH_LIBRARY_IMPL(PEFT_KERNELS_NAMESPACE, CPU, m) { m.impl("multi_bottleneck", multi_bottleneck); }

}  // namespace peft_kernels::cpu
