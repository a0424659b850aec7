// The CPU ops: tensors to pointers, and registration. Schemas live in peft_kernels/spec.py.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <tuple>

#include "absmax.h"
#include "checks.h"
#include "isa.h"
#include "parallel.h"

namespace peft_kernels::cpu {
namespace {

// Elements that one thread should have before a second is worth waking.
constexpr int64_t kQuantizeGrain = 16384;
constexpr int64_t kDequantizeGrain = 65536;

std::tuple<Tensor, Tensor> quantize_nf4(const Tensor& weight, int64_t blocksize) {
  const int shift = block_shift_of(blocksize);
  const DType dtype = dtype_of(weight, "weight");
  const Tensor w = weight.contiguous();
  const int64_t n = w.numel(), blocks = ceil_div(n, blocksize);
  Tensor packed = at::empty({(n + 1) / 2}, w.options().dtype(at::kByte));
  Tensor absmax = at::empty({blocks}, w.options().dtype(at::kFloat));
  const QuantizeParams params{w.const_data_ptr(),
                              dtype,
                              n,
                              shift,
                              packed.mutable_data_ptr<uint8_t>(),
                              absmax.mutable_data_ptr<float>()};
  const auto quantize = kernels().quantize;
  at::parallel_for(0, blocks, ceil_div(kQuantizeGrain, blocksize),
                   [&](int64_t begin, int64_t end) { quantize(params, begin, end); });
  return {packed, absmax};
}

std::tuple<Tensor, Tensor, Tensor> quantize_absmax(const Tensor& absmax) {
  check_dtype(absmax, at::kFloat, "absmax");
  const Tensor a = absmax.contiguous();
  const int64_t blocks = a.numel(), groups = ceil_div(blocks, nf4::kAbsmaxBlock);
  const Tensor offset = a.mean();
  Tensor q8 = at::empty({blocks}, a.options().dtype(at::kByte));
  Tensor absmax2 = at::empty({groups}, a.options());
  const float* in = a.const_data_ptr<float>();
  const float center = *offset.const_data_ptr<float>();
  uint8_t* codes = q8.mutable_data_ptr<uint8_t>();
  float* scales = absmax2.mutable_data_ptr<float>();
  at::parallel_for(0, groups, kQuantizeGrain / nf4::kAbsmaxBlock, [&](int64_t begin, int64_t end) {
    quantize_absmax_groups(in, blocks, center, begin, end, codes, scales);
  });
  return {q8, absmax2, offset};
}

Tensor unpack_absmax(const Tensor& q8, const Tensor& absmax2, const Tensor& offset) {
  check_dtype(q8, at::kByte, "q8");
  check_dtype(absmax2, at::kFloat, "absmax2");
  check_dtype(offset, at::kFloat, "offset");
  const Tensor codes = q8.contiguous(), scales = absmax2.contiguous();
  check_numel(scales, ceil_div(codes.numel(), nf4::kAbsmaxBlock), "absmax2");
  check_numel(offset, 1, "offset");
  Tensor absmax = at::empty({codes.numel()}, scales.options());
  const uint8_t* in = codes.const_data_ptr<uint8_t>();
  const float* scale = scales.const_data_ptr<float>();
  const float center = *offset.const_data_ptr<float>();
  float* out = absmax.mutable_data_ptr<float>();
  at::parallel_for(0, codes.numel(), kDequantizeGrain, [&](int64_t begin, int64_t end) {
    unpack_absmax_range(in, scale, center, begin, end, out);
  });
  return absmax;
}

Tensor dequantize_nf4(const Tensor& packed, const Tensor& absmax, const OptionalTensor& absmax2,
                      const OptionalTensor& offset, int64_t blocksize, at::IntArrayRef shape,
                      at::ScalarType dtype) {
  Tensor out = at::empty(shape, packed.options().dtype(dtype));
  const DType out_dtype = dtype_of(out, "dtype");
  const Nf4Holder weight(packed, absmax, absmax2, offset, blocksize, out.numel());
  void* data = out.mutable_data_ptr();
  const auto dequantize = kernels().dequantize;
  // Whole blocks, so that a table is built once and every thread starts in a high nibble.
  const int64_t blocks = ceil_div(out.numel(), blocksize);
  at::parallel_for(0, blocks, ceil_div(kDequantizeGrain, blocksize), [&](int64_t begin, int64_t end) {
    dequantize(weight.view(), begin * blocksize, std::min(end * blocksize, out.numel()), out_dtype, data);
  });
  return out;
}

// Sets what a linear layer's sums start from. Returns the tensor that must stay alive.
Tensor use_bias(GemmParams& params, const OptionalTensor& bias, at::ScalarType activation_dtype) {
  if (!bias) return {};
  const DType dtype = dtype_of(*bias, "bias");
  TORCH_CHECK(bias->scalar_type() == at::kFloat || bias->scalar_type() == activation_dtype,
              "bias: expected Float or ", activation_dtype, ", got ", bias->scalar_type());
  check_shape(*bias, {params.n}, "bias");
  Tensor b = bias->contiguous();
  params.bias = b.const_data_ptr();
  params.bias_dtype = dtype;
  return b;
}

Tensor nf4_linear(const Tensor& x, const Tensor& packed, const Tensor& absmax, const OptionalTensor& absmax2,
                  const OptionalTensor& offset, int64_t blocksize, int64_t out_features,
                  const OptionalTensor& bias) {
  TORCH_CHECK(x.dim() >= 1, "x: expected at least 1 dimension, got 0");
  TORCH_CHECK(out_features >= 0, "out_features: expected 0 or more, got ", out_features);
  const int64_t in_features = x.size(-1);
  const Tensor rows = activation(x, in_features, "x");
  const Nf4Holder weight(packed, absmax, absmax2, offset, blocksize, out_features * in_features);
  Tensor y = at::empty(sizes_with_last(x, out_features), x.options());
  GemmParams params = params_for(y);
  const Tensor bias_holder = use_bias(params, bias, x.scalar_type());
  add_term(params, term_of(rows, "x", weight.matrix(in_features)));
  run_gemm_nt(params);
  return y;
}

Tensor nf4_linear_dx(const Tensor& dy, const Tensor& packed, const Tensor& absmax,
                     const OptionalTensor& absmax2, const OptionalTensor& offset, int64_t blocksize,
                     int64_t in_features) {
  TORCH_CHECK(dy.dim() >= 1, "dy: expected at least 1 dimension, got 0");
  TORCH_CHECK(in_features >= 0, "in_features: expected 0 or more, got ", in_features);
  const int64_t out_features = dy.size(-1);
  const Tensor rows = activation(dy, out_features, "dy");
  const Nf4Holder weight(packed, absmax, absmax2, offset, blocksize, out_features * in_features);
  Tensor dx = at::empty(sizes_with_last(dy, in_features), dy.options());
  GemmParams params = params_for(dx);
  add_term(params, term_of(rows, "dy", weight.matrix(in_features)));
  run_gemm_nn(params);
  return dx;
}

// lhs rhs^T and lhs rhs as fp32, for the products that carry the rank.
Tensor product_nt(const Tensor& lhs, const Tensor& rhs) {
  Tensor out = at::empty(sizes_with_last(lhs, rhs.size(0)), lhs.options().dtype(at::kFloat));
  GemmParams params = params_for(out);
  add_term(params, term_of(lhs, "lhs", dense_matrix(rhs, "rhs")));
  run_gemm_nt(params);
  return out;
}

Tensor product_nn(const Tensor& lhs, const Tensor& rhs) {
  Tensor out = at::empty({lhs.size(0), rhs.size(-1)}, lhs.options().dtype(at::kFloat));
  GemmParams params = params_for(out);
  add_term(params, term_of(lhs, "lhs", dense_matrix(rhs, "rhs")));
  run_gemm_nn(params);
  return out;
}

struct Adapter {
  Tensor a;  // [r, in_features]
  Tensor b;  // [out_features, r]

  Adapter(const Tensor& lora_a, const Tensor& lora_b, at::ScalarType activation_dtype, double dropout_p) {
    check(lora_a, activation_dtype, "lora_a");
    check(lora_b, activation_dtype, "lora_b");
    check_shape(lora_b, {lora_b.size(0), lora_a.size(0)}, "lora_b");
    TORCH_CHECK(dropout_p == 0.0, "dropout_p: expected 0 on the CPU back end, got ", dropout_p);
    a = lora_a.contiguous();
    b = lora_b.contiguous();
  }
  int64_t rank() const { return a.size(0); }
  int64_t in_features() const { return a.size(1); }
  int64_t out_features() const { return b.size(0); }

 private:
  static void check(const Tensor& t, at::ScalarType activation_dtype, const char* name) {
    dtype_of(t, name);
    TORCH_CHECK(t.dim() == 2, name, ": expected 2 dimensions, got ", t.dim());
    TORCH_CHECK(t.scalar_type() == at::kFloat || t.scalar_type() == activation_dtype, name,
                ": expected Float or ", activation_dtype, ", got ", t.scalar_type());
  }
};

void check_dense_weight(const Tensor& weight, const Adapter& adapter, at::ScalarType activation_dtype) {
  check_dtype(weight, activation_dtype, "weight");
  check_shape(weight, {adapter.out_features(), adapter.in_features()}, "weight");
}

std::tuple<Tensor, Tensor> lora_linear(const Tensor& x, const Tensor& weight, const OptionalTensor& absmax,
                                       const OptionalTensor& absmax2, const OptionalTensor& offset,
                                       int64_t blocksize, const OptionalTensor& bias, const Tensor& lora_a,
                                       const Tensor& lora_b, double scaling, double dropout_p,
                                       const OptionalTensor& /*seed*/) {
  const Adapter adapter(lora_a, lora_b, x.scalar_type(), dropout_p);
  const Tensor rows = activation(x, adapter.in_features(), "x");
  const Tensor h = product_nt(rows, adapter.a);
  const GemmTerm delta = term_of(h, "h", dense_matrix(adapter.b, "lora_b"), static_cast<float>(scaling));
  if (!absmax) {
    check_dense_weight(weight, adapter, x.scalar_type());
    OptionalTensor base_bias = bias;
    if (bias) base_bias = bias->to(x.scalar_type());
    Tensor y = at::linear(rows, weight, base_bias).contiguous();
    GemmParams params = params_for(y);
    params.add_to_out = true;
    add_term(params, delta);
    run_gemm_nt(params);
    return {y, h};
  }
  const Nf4Holder base(weight, *absmax, absmax2, offset, blocksize,
                       adapter.out_features() * adapter.in_features());
  Tensor y = at::empty(sizes_with_last(x, adapter.out_features()), x.options());
  GemmParams params = params_for(y);
  const Tensor bias_holder = use_bias(params, bias, x.scalar_type());
  add_term(params, term_of(rows, "x", base.matrix(adapter.in_features())));
  add_term(params, delta);
  run_gemm_nt(params);
  return {y, h};
}

std::tuple<Tensor, Tensor, Tensor> lora_linear_backward(
    const Tensor& dy, const Tensor& x, const Tensor& h, const Tensor& weight, const OptionalTensor& absmax,
    const OptionalTensor& absmax2, const OptionalTensor& offset, int64_t blocksize, const Tensor& lora_a,
    const Tensor& lora_b, double scaling, double dropout_p, const OptionalTensor& /*seed*/, bool need_dx,
    bool need_da, bool need_db) {
  const Adapter adapter(lora_a, lora_b, x.scalar_type(), dropout_p);
  check_dtype(dy, x.scalar_type(), "dy");
  check_dtype(h, at::kFloat, "h");
  check_shape(dy, sizes_with_last(x, adapter.out_features()), "dy");
  check_shape(h, sizes_with_last(x, adapter.rank()), "h");
  const int64_t rows = rows_of(x);
  const Tensor dy_rows = activation(dy, adapter.out_features(), "dy").view({rows, adapter.out_features()});
  const Tensor x_rows = activation(x, adapter.in_features(), "x").view({rows, adapter.in_features()});
  const Tensor h_rows = activation(h, adapter.rank(), "h").view({rows, adapter.rank()});

  Tensor dx = at::empty({0}, x.options()), da = at::empty({0}, lora_a.options()),
         db = at::empty({0}, lora_b.options());
  Tensor dh;  // [rows, r] fp32
  if (need_dx || need_da) {
    const Tensor scaled_bt = adapter.b.to(at::kFloat).mul(scaling).t().contiguous();
    dh = product_nt(dy_rows, scaled_bt);
  }
  if (need_dx) {
    const GemmTerm delta = term_of(dh, "dh", dense_matrix(adapter.a, "lora_a"));
    if (absmax) {
      const Nf4Holder base(weight, *absmax, absmax2, offset, blocksize,
                           adapter.out_features() * adapter.in_features());
      dx = at::empty(x_rows.sizes(), x.options());
      GemmParams params = params_for(dx);
      add_term(params, term_of(dy_rows, "dy", base.matrix(adapter.in_features())));
      add_term(params, delta);
      run_gemm_nn(params);
    } else {
      check_dense_weight(weight, adapter, x.scalar_type());
      dx = at::mm(dy_rows, weight).contiguous();
      GemmParams params = params_for(dx);
      params.add_to_out = true;
      add_term(params, delta);
      run_gemm_nn(params);
    }
    dx = dx.view(x.sizes());
  }
  // The rank is the short side of both: it takes the place of the batch, and the features stay contiguous.
  if (need_da) da = product_nn(dh.t().contiguous(), x_rows).to(lora_a.scalar_type());
  if (need_db) {
    const Tensor scaled_ht = h_rows.t().mul(scaling).contiguous();
    db = product_nn(scaled_ht, dy_rows).t().to(lora_b.scalar_type()).contiguous();
  }
  return {dx, da, db};
}

}  // namespace

TORCH_LIBRARY_IMPL(peft_kernels_cpu, CPU, m) {
  m.impl("quantize_nf4", quantize_nf4);
  m.impl("quantize_absmax", quantize_absmax);
  m.impl("unpack_absmax", unpack_absmax);
  m.impl("dequantize_nf4", dequantize_nf4);
  m.impl("nf4_linear", nf4_linear);
  m.impl("nf4_linear_dx", nf4_linear_dx);
  m.impl("lora_linear", lora_linear);
  m.impl("lora_linear_backward", lora_linear_backward);
}

}  // namespace peft_kernels::cpu
