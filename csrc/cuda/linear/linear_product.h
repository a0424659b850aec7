// Products with the frozen weight of a layer, dense or NF4.
#pragma once

#include <c10/util/FunctionRef.h>

#include "../../common/lora_args.h"
#include "../../common/nf4_tensors.h"
#include "../core/runtime.h"
#include "linear.h"

namespace peft_kernels::cuda {

using BaseWeight = BaseWeightOf<Nf4Tensors>;

inline Nf4View view_of(const Nf4Tensors& weight) {
  if (weight.is_nested()) {
    return {weight.packed(),        weight.q8(),         weight.absmax2(), weight.offset(),
            nf4::kAbsmaxBlockShift, weight.block_shift()};
  }
  return {weight.packed(), weight.packed(), weight.absmax(), nullptr, 0, weight.block_shift()};
}

// Dequantises an NF4 weight piece by piece: body(begin, end, rows [end - begin, in_features]), of the type
// that `options` have. The next piece overwrites `rows`.
using RowPiece = c10::function_ref<void(int64_t begin, int64_t end, const Tensor& rows)>;
void by_row_pieces(const BaseWeight& base, const at::TensorOptions& options, RowPiece body);

// A slab and its memory; or nothing.
struct SlabTensor {
  Tensor memory;
  Slab view{};
};

// x W^T + bias or dY W: planned once, and then computed. x [m, in_features] and dY [m, out_features] are
// contiguous, and must live as long as this does.
class BaseProduct {
 public:
  static BaseProduct forward(const Tensor& x, const BaseWeight& base) { return {x, base, false}; }
  static BaseProduct backward(const Tensor& dy, const BaseWeight& base) { return {dy, base, true}; }

  // Whether it is a kernel's, which takes a slab.
  bool takes_slab() const { return plan_.has_kernel(); }
  Tensor run(const OptionalTensor& bias = std::nullopt, const Slab& slab = {}) const;

 private:
  BaseProduct(const Tensor& rows, const BaseWeight& base, bool is_dx);

  Tensor by_kernel(const OptionalTensor& bias, const Slab& slab) const;
  Tensor forward_by_pieces(const OptionalTensor& bias) const;
  Tensor backward_by_pieces() const;

  const Tensor& rows_;
  const BaseWeight& base_;
  bool is_dx_;
  LinearPlan plan_;
};

}  // namespace peft_kernels::cuda
