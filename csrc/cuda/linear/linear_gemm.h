// GEMMs with the frozen weight of a layer, dense or NF4.
#pragma once

#include <c10/util/FunctionRef.h>

#include "../../common/lora_args.h"
#include "../nf4/nf4_view.h"
#include "linear.h"

namespace peft_kernels::cuda {

using BaseWeight = BaseWeightOf<Nf4Tensors>;

// Dequantises an NF4 weight piece by piece and calls body(begin, end, rows [end - begin, in_features]), of
// the dtype in `options`. The next piece overwrites `rows`.
using RowPiece = c10::function_ref<void(int64_t begin, int64_t end, const Tensor& rows)>;
void by_row_pieces(const BaseWeight& base, const at::TensorOptions& options, RowPiece body);

// A slab and its memory; empty: no slab.
struct SlabTensor {
  Tensor memory;
  Slab view{};
};

// x W^T + bias or dY W: planned in the constructor, computed by run() or add_to(). Holds references: x [m,
// in_features] or dY [m, out_features], contiguous, and the weight must outlive it.
class BaseGemm {
 public:
  static BaseGemm forward(const Tensor& x, const BaseWeight& base) { return {x, base, false}; }
  static BaseGemm backward(const Tensor& dy, const BaseWeight& base) { return {dy, base, true}; }

  // Whether a kernel computes it, which accepts a slab. Otherwise torch does, which can add to a tensor.
  bool takes_slab() const { return plan_.has_kernel(); }
  Tensor run(const OptionalTensor& bias = std::nullopt, const Slab& slab = {}) const;
  // sum += the product without a bias, added before it is rounded. For GEMMs that take no slab.
  void add_to(const Tensor& sum) const;

 private:
  BaseGemm(const Tensor& rows, const BaseWeight& base, bool is_dx);

  Tensor by_kernel(const OptionalTensor& bias, const Slab& slab) const;
  // Calls body(begin, end, w) with the right-hand side w of columns [begin, end) of the product, for a packed
  // weight piece by piece. The next piece overwrites w.
  using Piece = c10::function_ref<void(int64_t begin, int64_t end, const Tensor& w)>;
  void by_pieces(Piece body) const;
  int64_t features() const { return is_dx_ ? base_.in_features() : base_.out_features(); }

  const Tensor& rows_;
  const BaseWeight& base_;
  bool is_dx_;
  LinearPlan plan_;
};

}  // namespace peft_kernels::cuda
