// Products with the frozen weight of a layer, dense or NF4.
#pragma once

#include <functional>

#include "../common/lora_args.h"
#include "../common/nf4_tensors.h"
#include "runtime.h"

namespace peft_kernels::cuda {

class Nf4Holder {
 public:
  template <class... Args>
  explicit Nf4Holder(const Args&... args) : tensors_(args...) {
    view_.packed = tensors_.packed();
    view_.block_shift = tensors_.block_shift();
    if (tensors_.is_nested()) {
      view_.q8 = tensors_.q8();
      view_.absmax2 = tensors_.absmax2();
      view_.offset = tensors_.offset();
    } else {
      view_.absmax = tensors_.absmax();
    }
  }

  const Nf4View& view() const { return view_; }

 private:
  Nf4Tensors tensors_;
  Nf4View view_{};
};

using BaseWeight = BaseWeightOf<Nf4Holder>;

// Which way a product with an NF4 weight goes: the name of a kernel, or "pieces", the general way. m is what
// x and dy have of rows.
const char* forward_way(int64_t m, int64_t n, int64_t k, int block_shift, at::ScalarType dtype,
                        const Card& card);
const char* backward_way(int64_t m, int64_t n, int64_t k, int block_shift, at::ScalarType dtype,
                         const Card& card);

// Dequantises an NF4 weight piece by piece: body(begin, end, rows [end - begin, in_features]), of the type
// that `options` have. The next piece overwrites `rows`.
using RowPiece = std::function<void(int64_t begin, int64_t end, const Tensor& rows)>;
void by_row_pieces(const BaseWeight& base, const at::TensorOptions& options, const RowPiece& body);

// A dense product that joins one with an NF4 weight in the same sums, as Slab has it; or nothing.
struct SlabTensors {
  Tensor u, v;
};

// Whether the products of x or dy with the weight have a kernel, which takes a slab.
bool forward_is_fused(const Tensor& x, const BaseWeight& base);
bool backward_is_fused(const Tensor& dy, const BaseWeight& base);

// x W^T + bias; x [m, in_features], contiguous. A slab only where it is fused.
Tensor forward_product(const Tensor& x, const BaseWeight& base, const OptionalTensor& bias,
                       const SlabTensors& slab = {});

// dy W; dy [m, out_features], contiguous. A slab only where it is fused.
Tensor backward_product(const Tensor& dy, const BaseWeight& base, const SlabTensors& slab = {});

}  // namespace peft_kernels::cuda
