// Runs the GEMMs of linear_gemm.h: by a kernel where one supports the shape, else by torch on dequantised
// pieces.
#include <ATen/ATen.h>
// Ahead of all others: it is precompiled (tools/precompiled.py).

#include "linear_gemm.h"

namespace peft_kernels::cuda {

void by_row_pieces(const BaseWeight& base, const at::TensorOptions& options, RowPiece body) {
  const int64_t n = base.out_features(), k = base.in_features();
  const auto size = static_cast<int64_t>(options.dtype().itemsize());
  const int64_t count = std::min(piece_of(n, k, size), n);
  const Tensor buffer = at::empty({count, k}, options);
  for (int64_t begin = 0; begin < n; begin += count) {
    const int64_t end = std::min(begin + count, n);
    const Tensor rows = buffer.slice(0, 0, end - begin);
    dequantize(base.nf4(), {begin, end, 0, k, k}, rows.mutable_data_ptr(), dtype_of(rows, "rows"), k,
               current_stream());
    body(begin, end, rows);
  }
}

BaseGemm::BaseGemm(const Tensor& rows, const BaseWeight& base, bool is_dx)
    : rows_(rows), base_(base), is_dx_(is_dx) {
  if (base.is_dense() || !has_view(base.nf4()) || !are_aligned({base.nf4().packed()})) return;
  const int64_t m = rows.size(0), n = base.out_features(), k = base.in_features();
  const int shift = base.nf4().block_shift();
  const DType dtype = dtype_of(rows, "rows");
  if (has_gemms(base.nf4())) {
    plan_ = plan_linear(is_dx, dtype, m, n, k, shift, current_card());
  } else if (are_aligned({base.nf4().q8()})) {
    plan_ = plan_scale_codes(is_dx, dtype, m, n, k, shift, current_card());
  }
}

Tensor BaseGemm::run(const OptionalTensor& bias, const Slab& slab) const {
  if (bias) check_bias(*bias, base_.out_features(), rows_.scalar_type());
  if (plan_.has_kernel()) return by_kernel(bias, slab);
  const OptionalTensor own_bias = bias ? OptionalTensor(bias->to(rows_.scalar_type()).contiguous()) : bias;
  const Tensor y = at::empty({rows_.size(0), features()}, rows_.options());
  by_pieces([&](int64_t begin, int64_t end, const Tensor& w) {
    Tensor out = y.slice(1, begin, end);
    if (own_bias) {
      at::addmm_out(out, own_bias->slice(0, begin, end), rows_, w);
    } else {
      at::mm_out(out, rows_, w);
    }
  });
  return y;
}

void BaseGemm::add_to(const Tensor& sum) const {
  by_pieces([&](int64_t begin, int64_t end, const Tensor& w) { sum.slice(1, begin, end).addmm_(rows_, w); });
}

Tensor BaseGemm::by_kernel(const OptionalTensor& bias, const Slab& slab) const {
  const Tensor x = are_aligned({rows_.const_data_ptr()}) ? rows_ : rows_.clone();
  Tensor y = at::empty({x.size(0), features()}, x.options());
  const Tensor own_bias = bias ? bias->contiguous() : Tensor();
  LinearParams params{};
  params.x = x.const_data_ptr();
  params.dtype = dtype_of(x, "x");
  params.weight = view_of(base_.nf4());
  params.m = static_cast<int>(x.size(0));
  params.n = static_cast<int>(base_.out_features());
  params.k = static_cast<int>(base_.in_features());
  if (bias) {
    params.bias = own_bias.const_data_ptr();
    params.bias_dtype = dtype_of(own_bias, "bias");
  }
  params.slab = slab;
  params.y = y.mutable_data_ptr();
  CallContext context;
  plan_.start(params, context);
  return y;
}

void BaseGemm::by_pieces(Piece body) const {
  const int64_t n = base_.out_features(), k = base_.in_features();
  if (base_.is_dense()) {
    body(0, features(), is_dx_ ? base_.dense() : base_.dense().t());
  } else if (!is_dx_) {
    by_row_pieces(base_, rows_.options(),
                  [&](int64_t begin, int64_t end, const Tensor& rows) { body(begin, end, rows.t()); });
  } else {  // by columns: pieces of rows would round the sums piece by piece
    const int64_t cols = piece_of(k, n, rows_.element_size());
    const Tensor buffer = at::empty({n, std::min(cols, k)}, rows_.options());
    for (int64_t begin = 0; begin < k; begin += cols) {
      const int64_t end = std::min(begin + cols, k);
      dequantize(base_.nf4(), {0, n, begin, end, k}, buffer.mutable_data_ptr(), dtype_of(rows_, "rows"),
                 buffer.size(1), current_stream());
      body(begin, end, buffer.slice(1, 0, end - begin));
    }
  }
}

}  // namespace peft_kernels::cuda
