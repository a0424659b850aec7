#include "linear_product.h"

namespace peft_kernels::cuda {
namespace {

// A weight is dequantised piece by piece: one that is still in the L2 cache when its product reads it.
constexpr int64_t kPieceBytes = 16 << 20;
// Pieces are multiples of this many rows or columns: whole tiles of torch's products, and whole words.
constexpr int64_t kPieceUnit = 256;

// How many of `count` rows or columns of `length` elements each make a piece, pieces being equal.
int64_t piece_of(int64_t count, int64_t length, int64_t element_size) {
  const int64_t most = std::max<int64_t>(kPieceBytes / (std::max<int64_t>(length, 1) * element_size), 1);
  const int64_t pieces = ceil_div(count, std::max(most / kPieceUnit * kPieceUnit, kPieceUnit));
  return std::max<int64_t>(ceil_div(ceil_div(count, std::max<int64_t>(pieces, 1)), kPieceUnit) * kPieceUnit,
                           1);
}

OptionalTensor checked_bias(const OptionalTensor& bias, int64_t features, at::ScalarType dtype) {
  if (!bias) return std::nullopt;
  check_bias(*bias, features, dtype);
  return bias->to(dtype).contiguous();
}

// y = x W^T + bias, W dequantised by rows.
void forward_by_pieces(const Tensor& x, const BaseWeight& base, const OptionalTensor& bias, Tensor& y) {
  by_row_pieces(base, x.options(), [&](int64_t begin, int64_t end, const Tensor& rows) {
    const Tensor transposed = rows.t();
    Tensor out = y.slice(1, begin, end);
    if (bias) {
      at::addmm_out(out, bias->slice(0, begin, end), x, transposed);
    } else {
      at::mm_out(out, x, transposed);
    }
  });
}

// dx = dy W, W dequantised by columns: sums over rows would be rounded piece by piece.
void backward_by_pieces(const Tensor& dy, const BaseWeight& base, Tensor& dx) {
  const int64_t n = base.out_features(), k = base.in_features();
  const int64_t cols = piece_of(k, n, dy.element_size());
  const Tensor buffer = at::empty({n, std::min(cols, k)}, dy.options());
  for (int64_t begin = 0; begin < k; begin += cols) {
    const int64_t end = std::min(begin + cols, k);
    check(dequantize_nf4(base.nf4().view(), {0, n, begin, end, k}, buffer.mutable_data_ptr(),
                         dtype_of(dy, "dy"), buffer.size(1), current_stream()));
    const Tensor piece = buffer.slice(1, 0, end - begin);
    Tensor out = dx.slice(1, begin, end);
    at::mm_out(out, dy, piece);
  }
}

constexpr const char* kPieces = "pieces";

bool is_half(at::ScalarType dtype) { return dtype == at::kBFloat16 || dtype == at::kHalf; }

// The plan of one direction, or none, for products that are no kernel's.
template <class PlanFunction>
LinearPlan plan_of(const PlanFunction& plan, const Tensor& rows, const BaseWeight& base) {
  if (base.is_dense() || !is_half(rows.scalar_type()) || !are_aligned({base.nf4().view().packed})) return {};
  return plan(rows.size(0), base.out_features(), base.in_features(), base.nf4().view().block_shift,
              current_card());
}

// One of the kernels. `rows` is x or dy.
template <class Kernel>
Tensor fused_product(const Kernel& kernel, const LinearPlan& plan, const Tensor& rows, const BaseWeight& base,
                     int64_t features, const OptionalTensor& bias, const SlabTensors& slab) {
  const Tensor x = are_aligned({rows.const_data_ptr()}) ? rows : rows.clone();
  Tensor y = at::empty({x.size(0), features}, x.options());
  const Tensor own_bias = bias ? bias->contiguous() : Tensor();
  const Tensor scratch = at::empty({plan.workspace_bytes}, x.options().dtype(at::kByte));
  LinearParams params{};
  params.x = x.const_data_ptr();
  params.dtype = dtype_of(x, "x");
  params.weight = base.nf4().view();
  params.m = x.size(0);
  params.n = base.out_features();
  params.k = base.in_features();
  if (bias) {
    check_bias(*bias, base.out_features(), x.scalar_type());
    params.bias = own_bias.const_data_ptr();
    params.bias_dtype = dtype_of(own_bias, "bias");
  }
  if (slab.u.defined()) params.slab = {slab.u.const_data_ptr(), slab.v.const_data_ptr(), slab.u.size(1)};
  params.y = y.mutable_data_ptr();
  check(kernel(params, current_card(), zeroed_counters(plan.counters), scratch.mutable_data_ptr(),
               current_stream()));
  return y;
}

}  // namespace

const char* forward_way(int64_t m, int64_t n, int64_t k, int block_shift, at::ScalarType dtype,
                        const Card& card) {
  const char* name = is_half(dtype) ? plan_linear(m, n, k, block_shift, card).name : nullptr;
  return name ? name : kPieces;
}

const char* backward_way(int64_t m, int64_t n, int64_t k, int block_shift, at::ScalarType dtype,
                         const Card& card) {
  const char* name = is_half(dtype) ? plan_linear_dx(m, n, k, block_shift, card).name : nullptr;
  return name ? name : kPieces;
}

void by_row_pieces(const BaseWeight& base, const at::TensorOptions& options, const RowPiece& body) {
  const int64_t n = base.out_features(), k = base.in_features();
  const int64_t count = std::min(piece_of(n, k, static_cast<int64_t>(options.dtype().itemsize())), n);
  const Tensor buffer = at::empty({count, k}, options);
  for (int64_t begin = 0; begin < n; begin += count) {
    const int64_t end = std::min(begin + count, n);
    const Tensor rows = buffer.slice(0, 0, end - begin);
    check(dequantize_nf4(base.nf4().view(), {begin, end, 0, k, k}, rows.mutable_data_ptr(),
                         dtype_of(rows, "rows"), k, current_stream()));
    body(begin, end, rows);
  }
}

bool forward_is_fused(const Tensor& x, const BaseWeight& base) {
  return plan_of(plan_linear, x, base).name != nullptr;
}

bool backward_is_fused(const Tensor& dy, const BaseWeight& base) {
  return plan_of(plan_linear_dx, dy, base).name != nullptr;
}

Tensor forward_product(const Tensor& x, const BaseWeight& base, const OptionalTensor& bias,
                       const SlabTensors& slab) {
  const LinearPlan plan = plan_of(plan_linear, x, base);
  if (plan.name) return fused_product(nf4_linear, plan, x, base, base.out_features(), bias, slab);
  const OptionalTensor own_bias = checked_bias(bias, base.out_features(), x.scalar_type());
  if (base.is_dense()) return at::linear(x, base.dense(), own_bias).contiguous();
  Tensor y = at::empty({x.size(0), base.out_features()}, x.options());
  forward_by_pieces(x, base, own_bias, y);
  return y;
}

Tensor backward_product(const Tensor& dy, const BaseWeight& base, const SlabTensors& slab) {
  const LinearPlan plan = plan_of(plan_linear_dx, dy, base);
  if (plan.name) return fused_product(nf4_linear_dx, plan, dy, base, base.in_features(), std::nullopt, slab);
  if (base.is_dense()) return at::mm(dy, base.dense()).contiguous();
  Tensor dx = at::empty({dy.size(0), base.in_features()}, dy.options());
  backward_by_pieces(dy, base, dx);
  return dx;
}

}  // namespace peft_kernels::cuda
