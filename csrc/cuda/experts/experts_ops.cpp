// The ops of layers with many experts: tensors to pointers, and registration. Which rows an expert has is
// known on the device alone, and is never read back.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "../../common/lora_args.h"
#include "../core/composed.h"
#include "experts_grouped.h"

namespace peft_kernels::cuda {
namespace {

void check_ends(const Tensor& ends) {
  check_dtype(ends, at::kInt, "ends");
  TORCH_CHECK(ends.dim() == 1, "ends: expected 1 dimension, got ", ends.dim());
}

void check_bias(const OptionalTensor& bias, const ExpertsWeight& weight, const Tensor& x) {
  if (!bias) return;
  parameter_dtype(*bias, x.scalar_type(), "bias");
  check_shape(*bias, {weight.experts(), weight.out_features()}, "bias");
}

// x W^T + bias + deltas, or with is_dx dY W + deltas, of rows sorted by expert.
class ExpertsGemm {
 public:
  // `rows` are those of the op, and with `wants_result` the product is computed.
  ExpertsGemm(const Tensor& rows, const ExpertsWeight& weight, bool is_dx, bool wants_result = true)
      : weight_(weight), is_dx_(is_dx), plan_(weight.plan(rows, is_dx)) {
    const int64_t features = is_dx ? weight.in_features() : weight.out_features();
    // torch allocates that of its grouped GEMM.
    if (wants_result && plan_.way == ExpertsWay::kFused)
      result_ = at::empty({rows.size(0), features}, rows.options());
  }

  bool is_composed() const { return plan_.way == ExpertsWay::kComposed; }
  int tile_rows() const { return plan_.tile_rows; }
  // To be zeroed in rows of no expert before run(), or undefined.
  const Tensor& result() const { return result_; }
  // `rows`: aligned.
  Tensor run(const Tensor& rows, const ListedRows& listed, const OptionalTensor& bias = std::nullopt,
             const ExpertsDelta& delta = {}) const {
    if (plan_.way == ExpertsWay::kGrouped) return grouped_gemm(rows, listed, weight_, is_dx_, bias, delta);
    const ManyNf4 nf4 = weight_.nf4();
    const Tensor own_bias = bias ? bias->contiguous() : Tensor();
    ExpertsParams params{};
    params.linear.x = rows.const_data_ptr();
    params.linear.dtype = dtype_of(rows, "rows");
    params.linear.weight = nf4.first;
    params.linear.m = static_cast<int>(rows.size(0));
    params.linear.n = static_cast<int>(weight_.out_features());
    params.linear.k = static_cast<int>(weight_.in_features());
    if (bias) {
      params.linear.bias = own_bias.const_data_ptr();
      params.linear.bias_dtype = dtype_of(own_bias, "bias");
    }
    params.linear.y = result_.mutable_data_ptr();
    params.rows = listed.view();
    params.scale_stride = nf4.scale_stride;
    params.delta = delta;
    CallContext context;
    if (plan_.is_wgmma) {
      experts_wgmma(is_dx_, params, context);
    } else {
      (is_dx_ ? experts_linear_dx : experts_linear)(params, context);
    }
    return result_;
  }

 private:
  const ExpertsWeight& weight_;
  bool is_dx_;
  ExpertsPlan plan_;
  Tensor result_;
};

Tensor experts_linear_op(const Tensor& x, const Tensor& ends, const Tensor& packed, const Tensor& absmax,
                         const OptionalTensor& absmax2, const OptionalTensor& offset, int64_t layout,
                         int64_t out_features, const OptionalTensor& bias) {
  const OnDeviceOf device(x, "x");
  check_ends(ends);
  TORCH_CHECK(x.dim() == 2, "x: expected 2 dimensions, got ", x.dim());
  TORCH_CHECK(out_features >= 0, "out_features: expected 0 or more, got ", out_features);
  const ExpertsWeight weight(packed, absmax, absmax2, offset, layout, ends.size(0), out_features, x.size(1),
                             x.scalar_type());
  const ExpertsGemm gemm(x, weight, false);
  if (gemm.is_composed()) {
    return composed(experts_linear_op, "experts_linear", x, ends, packed, absmax, absmax2, offset, layout,
                    out_features, bias);
  }
  check_bias(bias, weight, x);
  return gemm.run(aligned(x), {ends, x.size(0), gemm.tile_rows(), {gemm.result()}}, bias);
}

Tensor experts_linear_dx_op(const Tensor& dy, const Tensor& ends, const Tensor& packed, const Tensor& absmax,
                            const OptionalTensor& absmax2, const OptionalTensor& offset, int64_t layout,
                            int64_t in_features) {
  const OnDeviceOf device(dy, "dy");
  check_ends(ends);
  TORCH_CHECK(dy.dim() == 2, "dy: expected 2 dimensions, got ", dy.dim());
  TORCH_CHECK(in_features >= 0, "in_features: expected 0 or more, got ", in_features);
  const ExpertsWeight weight(packed, absmax, absmax2, offset, layout, ends.size(0), dy.size(1), in_features,
                             dy.scalar_type());
  const ExpertsGemm gemm(dy, weight, true);
  if (gemm.is_composed()) {
    return composed(experts_linear_dx_op, "experts_linear_dx", dy, ends, packed, absmax, absmax2, offset,
                    layout, in_features);
  }
  return gemm.run(aligned(dy), {ends, dy.size(0), gemm.tile_rows(), {gemm.result()}});
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
                                                  const OptionalTensor& offset, int64_t layout,
                                                  const OptionalTensor& bias, const Tensor& lora_a,
                                                  const Tensor& lora_b, double scaling) {
  const OnDeviceOf device(x, "x");
  check_ends(ends);
  TORCH_CHECK(x.dim() == 2, "x: expected 2 dimensions, got ", x.dim());
  const Adapters adapters(lora_a, lora_b, ends, x);
  const ExpertsWeight base(weight, absmax, absmax2, offset, layout, ends.size(0), adapters.out_features(),
                           x.size(1), x.scalar_type());
  const ExpertsGemm gemm(x, base, false);
  if (gemm.is_composed() || adapters.rank() == 0) {
    return composed(experts_lora_linear_op, "experts_lora_linear", x, ends, weight, absmax, absmax2, offset,
                    layout, bias, lora_a, lora_b, scaling);
  }
  check_bias(bias, base, x);
  const Tensor own_x = aligned(x);
  const Tensor h = at::empty({x.size(0), adapters.rank()}, x.options().dtype(at::kFloat));
  const ListedRows listed(ends, x.size(0), gemm.tile_rows(), {gemm.result(), h});
  {
    CallContext context;
    experts_ranks(listed.view(), dtype_of(own_x, "x"), own_x.const_data_ptr(), x.size(1), adapters.factor_a(),
                  false, 1.0f, h.mutable_data_ptr<float>(), context);
  }
  const ExpertsFactor b = adapters.factor_b();
  const ExpertsDelta delta{h.const_data_ptr<float>(), b.data, b.is_f32, b.rank, static_cast<float>(scaling)};
  return {gemm.run(own_x, listed, bias, delta), h};
}

std::tuple<Tensor, Tensor, Tensor> experts_lora_linear_backward_op(
    const Tensor& dy, const Tensor& x, const Tensor& h, const Tensor& ends, const Tensor& weight,
    const OptionalTensor& absmax, const OptionalTensor& absmax2, const OptionalTensor& offset, int64_t layout,
    const Tensor& lora_a, const Tensor& lora_b, double scaling, bool need_dx, bool need_da, bool need_db) {
  const OnDeviceOf device(dy, "dy");
  check_ends(ends);
  TORCH_CHECK(x.dim() == 2, "x: expected 2 dimensions, got ", x.dim());
  const Adapters adapters(lora_a, lora_b, ends, x);
  check_dtype(dy, x.scalar_type(), "dy");
  check_shape(dy, {x.size(0), adapters.out_features()}, "dy");
  check_dtype(h, at::kFloat, "h");
  check_shape(h, {x.size(0), adapters.rank()}, "h");
  const ExpertsWeight base(weight, absmax, absmax2, offset, layout, ends.size(0), adapters.out_features(),
                           x.size(1), x.scalar_type());
  // Planned the same without dx: the adapters' gradients must not depend on which results are needed.
  const ExpertsGemm gemm(dy, base, true, need_dx);
  if (gemm.is_composed() || adapters.rank() == 0) {
    return composed(experts_lora_linear_backward_op, "experts_lora_linear_backward", dy, x, h, ends, weight,
                    absmax, absmax2, offset, layout, lora_a, lora_b, scaling, need_dx, need_da, need_db);
  }
  const int rank = adapters.rank();
  const DType dtype = dtype_of(dy, "dy");
  const auto scale = static_cast<float>(scaling);
  const Tensor own_dy = aligned(dy), own_x = aligned(x), own_h = h.contiguous();
  const Tensor da = empty_unless(need_da, adapters.a), db = empty_unless(need_db, adapters.b);
  const ListedRows listed(ends, x.size(0), gemm.tile_rows(), {gemm.result()});
  Tensor dh, dx = empty_unless(false, x);
  if (need_dx || need_da) {
    dh = at::empty({x.size(0), rank}, x.options().dtype(at::kFloat));
    CallContext context;
    experts_ranks(listed.view(), dtype, own_dy.const_data_ptr(), dy.size(1), adapters.factor_b(), true, scale,
                  dh.mutable_data_ptr<float>(), context);
  }
  if (need_dx) {
    const ExpertsFactor a = adapters.factor_a();
    dx = gemm.run(own_dy, listed, std::nullopt, {dh.const_data_ptr<float>(), a.data, a.is_f32, rank, 1.0f});
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
