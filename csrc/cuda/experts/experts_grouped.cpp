// Runs grouped GEMMs by torch, piece by piece if the weights are NF4.
#include <ATen/ATen.h>
// Ahead of all others: it is precompiled (tools/precompiled.py).

#include "experts_grouped.h"

namespace peft_kernels::cuda {

#ifdef PEFT_KERNELS_PTX
namespace {
int64_t piece_bytes = kPieceBytes;
}  // namespace
void set_experts_piece_bytes(int64_t bytes) { piece_bytes = bytes; }
#else
static constexpr int64_t piece_bytes = kPieceBytes;
#endif

Tensor grouped_gemm(const Tensor& rows, const ListedRows& listed, const ExpertsWeight& weight, bool is_dx,
                    const OptionalTensor& bias, const ExpertsDelta& delta) {
  const int64_t experts = weight.experts(), n = weight.out_features(), k = weight.in_features();
  const int64_t features = is_dx ? k : n, depth = is_dx ? n : k;
  const bool is_nf4 = !weight.dense().defined();
  const int64_t piece =
      is_nf4 ? std::min(piece_of(features, experts * depth, rows.element_size(), piece_bytes), features)
             : features;
  const bool is_whole = piece == features;
  const Tensor buffer = is_nf4 ? at::empty({experts * piece * depth}, rows.options()) : Tensor();
  const Tensor own_bias = bias ? bias->to(at::kFloat).contiguous() : Tensor();
  const Tensor ends = listed.ends();
  Tensor result = is_whole ? Tensor() : at::empty({rows.size(0), features}, rows.options());
  for (int64_t begin = 0; begin < features; begin += piece) {
    const int64_t count = std::min(piece, features - begin);
    Tensor w = weight.dense();
    if (is_nf4) {
      w = buffer.narrow(0, 0, experts * count * depth).view({experts, is_dx ? n : count, is_dx ? count : k});
      const Part part = is_dx ? Part{0, n, begin, begin + count, k} : Part{begin, begin + count, 0, k, k};
      weight.dequantize(part, w);
    }
    const Tensor product = at::_grouped_mm(rows, is_dx ? w : w.transpose(1, 2), ends);
    if (is_whole) result = product;
    if (is_whole && !bias && delta.rank == 0) break;
    experts_expand(listed.view(),
                   {product.const_data_ptr(), begin, count, features, delta, is_dx,
                    bias ? own_bias.const_data_ptr<float>() : nullptr, result.mutable_data_ptr()},
                   current_stream());
  }
  listed.clear_rest(result);
  return result;
}

}  // namespace peft_kernels::cuda
