// The ops of DoRA: tensors to pointers, and registration. Schemas live in peft_kernels/spec.py.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <tuple>

#include "../common/dora_norm.h"
#include "../common/elementwise_args.h"
#include "adapters.h"
#include "base_product.h"

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
  check(dora_scale(params_of(args), y.mutable_data_ptr(), current_stream()));
  return y;
}

std::tuple<Tensor, Tensor> dora_scale_backward_op(const Tensor& dy, const Tensor& z, const Tensor& scale,
                                                  const OptionalTensor& bias) {
  const OnDeviceOf device(dy, "dy");
  const DoraScaleArgs args(z, scale, bias);
  const Tensor d = matching(dy, z, "dy");
  Tensor dz = at::empty(z.sizes(), z.options()), d_scale = at::empty_like(args.scale);
  const DoraScale params = params_of(args);
  const Tensor workspace = at::empty({dora_scale_backward_workspace(params, current_card())},
                                     args.scale.options().dtype(at::kByte));
  check(dora_scale_backward(params, d.const_data_ptr(), dz.mutable_data_ptr(),
                            d_scale.mutable_data_ptr<float>(), current_card(), workspace.mutable_data_ptr(),
                            current_stream()));
  return {dz, d_scale};
}

// Of the rows of a weight W, in fp32: their squares, and W A^T.
struct RowSums {
  Tensor squares, products;
};

RowSums views_of(const Tensor& sums) { return {sums.select(1, 0), sums.slice(1, 1)}; }

RowSums nf4_row_sums(const BaseWeight& base, const DoraNormArgs& args) {
  const int64_t n = base.out_features(), k = base.in_features(), ranks = args.a.size(0);
  Tensor sums = at::empty({n, 1 + ranks}, args.a.options());
  const RowSumsParams params{base.nf4().view(), n, k, args.a.const_data_ptr<float>(), ranks};
  if (has_row_sums(params)) {
    const Tensor workspace =
        at::empty({row_sums_workspace(params, current_card())}, sums.options().dtype(at::kByte));
    check(row_sums(params, sums.mutable_data_ptr<float>(), current_card(), workspace.mutable_data_ptr(),
                   current_stream()));
  } else {
    by_row_pieces(base, sums.options(), [&](int64_t begin, int64_t end, const Tensor& rows) {
      RowSums out = views_of(sums.slice(0, begin, end));
      at::sum_out(out.squares, rows.square(), 1);
      at::mm_out(out.products, rows, args.a.t());
    });
  }
  return views_of(sums);
}

// The products are those of activations with an adapter.
RowSums dense_row_sums(const Tensor& weight, const DoraNormArgs& args) {
  const AdapterArgs adapter(args.a, args.b, args.in_features(), weight.scalar_type(), 0, 1.0, {0, 0, 1.0f}, 0,
                            0);
  return {at::linalg_vector_norm(weight, 2, 1, false, at::kFloat).square_(),
          adapters_for(weight, {adapter}, std::nullopt, std::nullopt)->h(weight)};
}

Tensor dora_norm_op(const Tensor& weight, const OptionalTensor& absmax, const OptionalTensor& absmax2,
                    const OptionalTensor& offset, int64_t blocksize, const Tensor& lora_a,
                    const Tensor& lora_b, double scaling) {
  const OnDeviceOf device(weight, "weight");
  const DoraNormArgs args(lora_a, lora_b, scaling);
  if (!absmax) dtype_of(weight, "weight");
  const BaseWeight base(weight, absmax, absmax2, offset, blocksize, args.out_features(), args.in_features(),
                        weight.scalar_type());
  const RowSums sums = base.is_dense() ? dense_row_sums(base.dense(), args) : nf4_row_sums(base, args);
  return args.norm(sums.squares, sums.products);
}

}  // namespace

TORCH_LIBRARY_IMPL(PEFT_KERNELS_NAMESPACE, PEFT_KERNELS_DISPATCH_KEY, m) {
  m.impl("dora_norm", dora_norm_op);
  m.impl("dora_scale", dora_scale_op);
  m.impl("dora_scale_backward", dora_scale_backward_op);
}

}  // namespace peft_kernels::cuda
