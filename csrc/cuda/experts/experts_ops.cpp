// The ops of layers with many experts: tensors to pointers, and registration. Which rows an expert has is
// known on the device alone, and is never read back.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <limits>
#include <tuple>
#include <vector>

#include "../core/composed.h"
#include "../core/listed_rows.h"
#include "../core/runtime.h"
#include "../linear/linear_gemm.h"
#include "experts.h"

namespace peft_kernels::cuda {
namespace {

// NF4 weights of experts, [experts, out_features, in_features].
class ExpertsWeight {
 public:
  ExpertsWeight(const Tensor& packed, const Tensor& absmax, const OptionalTensor& absmax2,
                const OptionalTensor& offset, int64_t blocksize, int64_t experts, int64_t out_features,
                int64_t in_features)
      : tensors_(packed, absmax, absmax2, offset, blocksize, out_features * in_features, experts),
        experts_(experts),
        out_features_(out_features),
        in_features_(in_features) {}

  int64_t experts() const { return experts_; }
  int64_t out_features() const { return out_features_; }
  int64_t in_features() const { return in_features_; }
  int block_shift() const { return tensors_.block_shift(); }
  // Scales of one expert, of the second level if there are two.
  int64_t scale_stride() const {
    const int64_t blocks = ceil_div(out_features_ * in_features_, int64_t{1} << block_shift());
    return tensors_.is_nested() ? ceil_div(blocks, nf4::kAbsmaxBlock) : blocks;
  }
  bool is_aligned() const { return are_aligned({tensors_.packed()}); }
  // The view of the first expert.
  Nf4View view() const { return view_of(tensors_); }

 private:
  Nf4Tensors tensors_;
  int64_t experts_, out_features_, in_features_;
};

void check_ends(const Tensor& ends) {
  check_dtype(ends, at::kInt, "ends");
  TORCH_CHECK(ends.dim() == 1, "ends: expected 1 dimension, got ", ends.dim());
}

// Contiguous and 16-byte aligned, as kernels require.
Tensor aligned(const Tensor& t) {
  const Tensor own = t.contiguous();
  return are_aligned({own.const_data_ptr()}) ? own : own.clone();
}

ExpertsParams params_of(const Tensor& x, const ExpertsWeight& weight, const ListedRows& listed,
                        const Tensor& y) {
  ExpertsParams params{};
  params.linear.x = x.const_data_ptr();
  params.linear.dtype = dtype_of(x, "x");
  params.linear.weight = weight.view();
  params.linear.m = static_cast<int>(x.size(0));
  params.linear.n = static_cast<int>(weight.out_features());
  params.linear.k = static_cast<int>(weight.in_features());
  params.linear.y = y.mutable_data_ptr();
  params.rows = listed.view();
  params.scale_stride = weight.scale_stride();
  return params;
}

int tile_rows(const Tensor& x, const ExpertsWeight& weight, bool is_dx) {
  if (x.size(0) == 0 || x.size(0) > std::numeric_limits<int>::max() || !weight.is_aligned()) return 0;
  return (is_dx ? experts_dx_tile_rows : experts_tile_rows)(dtype_of(x, "x"), weight.experts(), x.size(0),
                                                            weight.out_features(), weight.in_features(),
                                                            weight.block_shift(), current_card());
}

// Sets the experts' biases; returns the tensor that owns them.
Tensor set_bias(const OptionalTensor& bias, const ExpertsWeight& weight, const Tensor& x,
                ExpertsParams& params) {
  if (!bias) return {};
  params.linear.bias_dtype = parameter_dtype(*bias, x.scalar_type(), "bias");
  check_shape(*bias, {weight.experts(), weight.out_features()}, "bias");
  const Tensor own = bias->contiguous();
  params.linear.bias = own.const_data_ptr();
  return own;
}

Tensor experts_linear_op(const Tensor& x, const Tensor& ends, const Tensor& packed, const Tensor& absmax,
                         const OptionalTensor& absmax2, const OptionalTensor& offset, int64_t blocksize,
                         int64_t out_features, const OptionalTensor& bias) {
  const OnDeviceOf device(x, "x");
  check_ends(ends);
  TORCH_CHECK(x.dim() == 2, "x: expected 2 dimensions, got ", x.dim());
  TORCH_CHECK(out_features >= 0, "out_features: expected 0 or more, got ", out_features);
  const ExpertsWeight weight(packed, absmax, absmax2, offset, blocksize, ends.size(0), out_features,
                             x.size(1));
  const int rows_of_tile = tile_rows(x, weight, false);
  if (rows_of_tile == 0) {
    return composed(experts_linear_op, "experts_linear", x, ends, packed, absmax, absmax2, offset, blocksize,
                    out_features, bias);
  }
  const Tensor own_x = aligned(x), y = at::empty({x.size(0), out_features}, x.options());
  const ListedRows listed(ends, x.size(0), rows_of_tile, {y});
  ExpertsParams params = params_of(own_x, weight, listed, y);
  const Tensor own_bias = set_bias(bias, weight, x, params);
  CallContext context;
  experts_linear(params, context);
  return y;
}

Tensor experts_linear_dx_op(const Tensor& dy, const Tensor& ends, const Tensor& packed, const Tensor& absmax,
                            const OptionalTensor& absmax2, const OptionalTensor& offset, int64_t blocksize,
                            int64_t in_features) {
  const OnDeviceOf device(dy, "dy");
  check_ends(ends);
  TORCH_CHECK(dy.dim() == 2, "dy: expected 2 dimensions, got ", dy.dim());
  TORCH_CHECK(in_features >= 0, "in_features: expected 0 or more, got ", in_features);
  const ExpertsWeight weight(packed, absmax, absmax2, offset, blocksize, ends.size(0), dy.size(1),
                             in_features);
  const int rows_of_tile = tile_rows(dy, weight, true);
  if (rows_of_tile == 0) {
    return composed(experts_linear_dx_op, "experts_linear_dx", dy, ends, packed, absmax, absmax2, offset,
                    blocksize, in_features);
  }
  const Tensor own_dy = aligned(dy), dx = at::empty({dy.size(0), in_features}, dy.options());
  const ListedRows listed(ends, dy.size(0), rows_of_tile, {dx});
  CallContext context;
  experts_linear_dx(params_of(own_dy, weight, listed, dx), context);
  return dx;
}

// The adapters of all experts, validated.
struct Adapters {
  Tensor a, b;  // [experts, rank, in_features], [experts, out_features, rank]

  Adapters(const Tensor& lora_a, const Tensor& lora_b, const Tensor& ends, const Tensor& x) {
    check_experts_adapters(lora_a, lora_b, x, ends.size(0));
    a = aligned(lora_a);
    b = aligned(lora_b);
  }

  int rank() const { return static_cast<int>(a.size(1)); }
  int64_t out_features() const { return b.size(1); }
  ExpertsFactor factor_a() const { return {a.const_data_ptr(), a.scalar_type() == at::kFloat, rank()}; }
  ExpertsFactor factor_b() const { return {b.const_data_ptr(), b.scalar_type() == at::kFloat, rank()}; }
};

std::tuple<Tensor, Tensor> experts_lora_linear_op(const Tensor& x, const Tensor& ends, const Tensor& weight,
                                                  const OptionalTensor& absmax, const OptionalTensor& absmax2,
                                                  const OptionalTensor& offset, int64_t blocksize,
                                                  const OptionalTensor& bias, const Tensor& lora_a,
                                                  const Tensor& lora_b, double scaling) {
  const OnDeviceOf device(x, "x");
  check_ends(ends);
  TORCH_CHECK(x.dim() == 2, "x: expected 2 dimensions, got ", x.dim());
  const Adapters adapters(lora_a, lora_b, ends, x);
  const auto fallback = [&] {
    return composed(experts_lora_linear_op, "experts_lora_linear", x, ends, weight, absmax, absmax2, offset,
                    blocksize, bias, lora_a, lora_b, scaling);
  };
  if (!absmax) return fallback();
  const ExpertsWeight base(weight, *absmax, absmax2, offset, blocksize, ends.size(0), adapters.out_features(),
                           x.size(1));
  const int rows_of_tile = tile_rows(x, base, false);
  if (rows_of_tile == 0 || adapters.rank() == 0) return fallback();

  const Tensor own_x = aligned(x), y = at::empty({x.size(0), base.out_features()}, x.options());
  const Tensor h = at::empty({x.size(0), adapters.rank()}, x.options().dtype(at::kFloat));
  const ListedRows listed(ends, x.size(0), rows_of_tile, {y, h});
  {
    CallContext context;
    experts_ranks(listed.view(), dtype_of(own_x, "x"), own_x.const_data_ptr(), x.size(1), adapters.factor_a(),
                  false, 1.0f, h.mutable_data_ptr<float>(), context);
  }
  ExpertsParams params = params_of(own_x, base, listed, y);
  const Tensor own_bias = set_bias(bias, base, x, params);
  const ExpertsFactor b = adapters.factor_b();
  params.delta = {h.const_data_ptr<float>(), b.data, b.is_f32, b.rank, static_cast<float>(scaling)};
  CallContext context;
  experts_linear(params, context);
  return {y, h};
}

std::tuple<Tensor, Tensor, Tensor> experts_lora_linear_backward_op(
    const Tensor& dy, const Tensor& x, const Tensor& h, const Tensor& ends, const Tensor& weight,
    const OptionalTensor& absmax, const OptionalTensor& absmax2, const OptionalTensor& offset,
    int64_t blocksize, const Tensor& lora_a, const Tensor& lora_b, double scaling, bool need_dx, bool need_da,
    bool need_db) {
  const OnDeviceOf device(dy, "dy");
  check_ends(ends);
  TORCH_CHECK(x.dim() == 2, "x: expected 2 dimensions, got ", x.dim());
  const Adapters adapters(lora_a, lora_b, ends, x);
  check_dtype(dy, x.scalar_type(), "dy");
  check_shape(dy, {x.size(0), adapters.out_features()}, "dy");
  check_dtype(h, at::kFloat, "h");
  check_shape(h, {x.size(0), adapters.rank()}, "h");
  const auto fallback = [&] {
    return composed(experts_lora_linear_backward_op, "experts_lora_linear_backward", dy, x, h, ends, weight,
                    absmax, absmax2, offset, blocksize, lora_a, lora_b, scaling, need_dx, need_da, need_db);
  };
  if (!absmax) return fallback();
  const ExpertsWeight base(weight, *absmax, absmax2, offset, blocksize, ends.size(0), adapters.out_features(),
                           x.size(1));
  // The same condition without dx: the adapters' gradients must not depend on which results are needed.
  const int rows_of_tile = tile_rows(dy, base, true);
  if (rows_of_tile == 0 || adapters.rank() == 0) return fallback();

  const int rank = adapters.rank();
  const DType dtype = dtype_of(dy, "dy");
  const auto scale = static_cast<float>(scaling);
  const Tensor own_dy = aligned(dy), own_x = aligned(x), own_h = h.contiguous();
  const Tensor dx = empty_unless(need_dx, x), da = empty_unless(need_da, adapters.a),
               db = empty_unless(need_db, adapters.b);
  const ListedRows listed(ends, x.size(0), rows_of_tile,
                          need_dx ? std::vector<Tensor>{dx} : std::vector<Tensor>{});
  Tensor dh;
  if (need_dx || need_da) {
    dh = at::empty({x.size(0), rank}, x.options().dtype(at::kFloat));
    CallContext context;
    experts_ranks(listed.view(), dtype, own_dy.const_data_ptr(), dy.size(1), adapters.factor_b(), true, scale,
                  dh.mutable_data_ptr<float>(), context);
  }
  if (need_dx) {
    ExpertsParams params = params_of(own_dy, base, listed, dx);
    const ExpertsFactor a = adapters.factor_a();
    params.delta = {dh.const_data_ptr<float>(), a.data, a.is_f32, rank, 1.0f};
    CallContext context;
    experts_linear_dx(params, context);
  }
  if (need_da) {
    experts_gradient(listed.view(), dtype, own_x.const_data_ptr(), x.size(1), dh.const_data_ptr<float>(),
                     rank, false, 1.0f, da.mutable_data_ptr(), da.scalar_type() == at::kFloat,
                     current_stream());
  }
  if (need_db) {
    experts_gradient(listed.view(), dtype, own_dy.const_data_ptr(), dy.size(1), own_h.const_data_ptr<float>(),
                     rank, true, scale, db.mutable_data_ptr(), db.scalar_type() == at::kFloat,
                     current_stream());
  }
  return {dx, da, db};
}

}  // namespace

TORCH_LIBRARY_IMPL(PEFT_KERNELS_NAMESPACE, PEFT_KERNELS_DISPATCH_KEY, m) {
  m.impl("experts_linear", experts_linear_op);
  m.impl("experts_linear_dx", experts_linear_dx_op);
  m.impl("experts_lora_linear", experts_lora_linear_op);
  m.impl("experts_lora_linear_backward", experts_lora_linear_backward_op);
}

}  // namespace peft_kernels::cuda
