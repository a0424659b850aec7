// The ops of DoRA: tensors to pointers, and registration. Schemas live in peft_kernels/ops/.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <tuple>

#include "../../common/dora_args.h"
#include "dora.h"
#include "lora_adapters.h"

namespace peft_kernels::cuda {
namespace {

DoraScale params_of(const DoraScaleArgs& args) {
  return {args.z.const_data_ptr(), args.dtype, args.scale.const_data_ptr<float>(),
          args.bias_data(),        args.rows,  args.features};
}

Tensor dora_scale_op(const Tensor& z, const Tensor& scale, const OptionalTensor& bias) {
  const OnDeviceOf device(z, "z");
  const DoraScaleArgs args(z, scale, bias);
  Tensor y = at::empty(z.sizes(), z.options());
  dora_scale(params_of(args), y.mutable_data_ptr(), current_stream());
  return y;
}

std::tuple<Tensor, Tensor> dora_scale_backward_op(const Tensor& dy, const Tensor& z, const Tensor& scale,
                                                  const OptionalTensor& bias) {
  const OnDeviceOf device(dy, "dy");
  const DoraScaleArgs args(z, scale, bias);
  const Tensor d = matching(dy, z, "dy");
  Tensor dz = at::empty(z.sizes(), z.options()), d_scale = at::empty_like(args.scale);
  CallContext context;
  dora_scale_backward(params_of(args), d.const_data_ptr(), dz.mutable_data_ptr(),
                      d_scale.mutable_data_ptr<float>(), context);
  return {dz, d_scale};
}

// Sums over the rows of a weight W, in fp32: squares [splits, n], and W A^T [splits, n, r].
struct Sums {
  Tensor squares, products;
};

// Splits [.., 1 + r] into these.
Sums parts_of(const Tensor& sums) { return {sums.select(-1, 0), sums.slice(-1, 1)}; }

Sums nf4_sums(const BaseWeight& base, const DoraNormArgs& args) {
  const int64_t n = base.out_features(), k = base.in_features(), ranks = args.a.size(0);
  const bool is_read = has_view(base.nf4());
  const RowSums params{is_read ? view_of(base.nf4()) : Nf4View{}, n, k, args.a.const_data_ptr<float>(),
                       ranks};
  if (is_read && has_row_sums(params)) {
    const int splits = row_sums_splits(params, current_card());
    Tensor sums = at::empty({splits, n, 1 + ranks}, args.a.options());
    row_sums(params, splits, sums.mutable_data_ptr<float>(), current_stream());
    return parts_of(sums);
  }
  const Tensor sums = at::empty({1, n, 1 + ranks}, args.a.options());
  by_row_pieces(base, sums.options(), [&](int64_t begin, int64_t end, const Tensor& rows) {
    Sums out = parts_of(sums[0].slice(0, begin, end));
    at::sum_out(out.squares, rows.square(), 1);
    at::mm_out(out.products, rows, args.a.t());
  });
  return parts_of(sums);
}

// The rows of W are treated as activations with an adapter.
Sums dense_sums(const Tensor& weight, const DoraNormArgs& args) {
  const AdapterArgs adapter(args.a, args.b, args.in_features(), weight.scalar_type(), 0, 1.0, {0, 0, 1.0f}, 0,
                            0);
  return {at::linalg_vector_norm(weight, 2, 1, false, at::kFloat).square_().unsqueeze(0),
          adapters_for(weight, {adapter}, std::nullopt, std::nullopt)->h(weight).unsqueeze(0)};
}

Tensor dora_norm_op(const Tensor& weight, const OptionalTensor& absmax, const OptionalTensor& absmax2,
                    const OptionalTensor& offset, int64_t layout, const Tensor& lora_a, const Tensor& lora_b,
                    double scaling) {
  const OnDeviceOf device(weight, "weight");
  const DoraNormArgs args(lora_a, lora_b);
  if (!absmax) dtype_of(weight, "weight");
  const BaseWeight base(weight, absmax, absmax2, offset, layout, args.out_features(), args.in_features(),
                        weight.scalar_type());
  const Sums sums = base.is_dense() ? dense_sums(base.dense().contiguous(), args) : nf4_sums(base, args);
  const Tensor gram = at::mm(args.a, args.a.t()), b = args.b.contiguous();
  Tensor norm = at::empty({args.out_features()}, gram.options());
  dora_norm(
      {sums.squares.const_data_ptr<float>(), sums.squares.stride(1), sums.products.const_data_ptr<float>(),
       sums.products.stride(1), static_cast<int>(sums.products.size(0)), sums.products.stride(0),
       b.const_data_ptr<float>(), gram.const_data_ptr<float>(), static_cast<float>(scaling), norm.numel(),
       gram.size(0), norm.mutable_data_ptr<float>()},
      current_stream());
  return norm;
}

}  // namespace

TORCH_LIBRARY_IMPL(PEFT_KERNELS_NAMESPACE, PEFT_KERNELS_DISPATCH_KEY, m) {
  m.impl("dora_norm", dora_norm_op);
  m.impl("dora_scale", dora_scale_op);
  m.impl("dora_scale_backward", dora_scale_backward_op);
}

}  // namespace peft_kernels::cuda
