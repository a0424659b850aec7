// The head of a language model, and the rows that have a label.
#pragma once

#include <ATen/ATen.h>

#include <vector>

#include "../linear/linear_gemm.h"

namespace peft_kernels::cpu {

inline constexpr int64_t kLogitTileCols = 512;  // logits computed at a time
static_assert(kLogitTileCols <= kSoftmaxCols, "");
inline constexpr int64_t kMostRoundings = 8;  // of a whole head, tile by tile; a copy costs about as much

// The rows that have a label, and their labels.
struct Labelled {
  std::vector<int64_t> rows, labels;

  Labelled(const Tensor& labels_in, int64_t ignored, int64_t vocabulary) {
    const Tensor all = labels_in.contiguous();
    const int64_t* label = all.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < all.numel(); ++i) {
      if (label[i] == ignored) continue;
      TORCH_CHECK(0 <= label[i] && label[i] < vocabulary, "labels: expected 0 to ", vocabulary - 1, ", or ",
                  ignored, " to ignore, got ", label[i]);
      rows.push_back(i);
      labels.push_back(label[i]);
    }
  }
  int64_t count() const { return static_cast<int64_t>(rows.size()); }
};

// The head's weight. An fp32 head with 16-bit rows is rounded to their dtype, as under autocast, one tile at
// a time when needed: a rounded copy would be fresh memory, and touching that costs more than rounding
// everything a few times.
class Head {
 public:
  Head(const Tensor& weight, const OptionalTensor& absmax, const OptionalTensor& absmax2,
       const OptionalTensor& offset, int64_t layout, int64_t vocabulary, const Tensor& x)
      : rounds_(!absmax && weight.scalar_type() == at::kFloat && x.scalar_type() != at::kFloat &&
                weight.is_contiguous()),
        base_(absmax || rounds_ ? weight : as_multiplied(weight, x), absmax, absmax2, offset, layout,
              vocabulary, x.size(1), rounds_ ? at::kFloat : x.scalar_type()),
        like_(at::empty({0, x.size(1)}, x.options())) {
    if (base_.is_dense()) {
      dense_ = base_.dense();
    } else if (tile_cols() > kSoftmaxCols) {  // rows may start within bytes, or within blocks of scales
      dense_ = at::empty({vocabulary, x.size(1)}, x.options());
      const auto dequantize = kernels().dequantize;
      parallel_for(0, dense_.numel(), kElementwiseGrain, [&](int64_t begin, int64_t end) {
        dequantize(base_.nf4().view(), begin, end, dtype_of(dense_, "weight"), dense_.mutable_data_ptr());
      });
    }
  }
  bool is_dense() const { return dense_.defined(); }
  bool uses_torch(int64_t rows) const {
    return is_dense() && uses_torch_gemm(rounds_ ? like_ : dense_, rows);
  }
  // Called with the number of times that all of it will be read.
  void prepare(int64_t times) {
    if (!rounds_ || times <= kMostRoundings) return;
    dense_ = dense_.to(like_.scalar_type());
    rounds_ = false;
  }
  // Rows of a dense head, in x's dtype.
  Tensor dense(int64_t first, int64_t last) const {
    return dense_.slice(0, first, last).to(like_.scalar_type());
  }
  bool rounds() const { return rounds_; }
  // A buffer for that many rounded rows; empty if nothing is rounded.
  Tensor buffer(int64_t rows) const {
    return at::empty({rounds_ ? rows : 0, like_.size(1)}, like_.options());
  }

  // The columns of logits per tile: tiles begin where a block of nested scales begins.
  int64_t tile_cols() const {
    if (is_dense() || base_.in_features() == 0) return kLogitTileCols;
    const int64_t unit = base_.nf4().row_unit();
    return ceil_div(kLogitTileCols, unit) * unit > kSoftmaxCols ? unit
                                                                : ceil_div(kLogitTileCols, unit) * unit;
  }
  // Rows [first, first + count), rounded into `buffer` if necessary; `view` holds a packed head's.
  MatrixView rows(int64_t first, int64_t count, Nf4View& view, const Tensor& buffer) const {
    const MatrixView matrix = rows_from(first, view);
    if (!rounds_) return matrix;
    // As many short rows, so that memory is read in order.
    constexpr int64_t kRun = 16;
    const int64_t numel = count * matrix.ld, cols = numel % kRun == 0 ? kRun : matrix.ld;
    const DType dtype = dtype_of(like_, "x");
    const TransposeParams params{matrix.data,  matrix.dtype,
                                 numel / cols, cols,
                                 cols,         nullptr,
                                 dtype,        0,
                                 1.0f,         buffer.mutable_data_ptr()};
    if (numel > 0) kernels().transpose_rows(params, 0, params.rows);
    return {params.copy, dtype, matrix.ld, nullptr};
  }
  // Rows from `first` on, in place; `view` holds a packed head's.
  MatrixView rows_from(int64_t first, Nf4View& view) const {
    if (is_dense()) {
      MatrixView matrix = dense_matrix(dense_, "weight");
      matrix.data = element_ptr(dense_, first * matrix.ld);
      return matrix;
    }
    view = base_.nf4().view_from_row(first);
    return {nullptr, DType::kF32, base_.in_features(), &view};
  }

 private:
  // A dense head as it is multiplied.
  static Tensor as_multiplied(const Tensor& weight, const Tensor& x) {
    return (weight.scalar_type() == at::kFloat ? weight.to(x.scalar_type()) : weight).contiguous();
  }

  bool rounds_;
  const BaseWeight base_;
  const Tensor like_;  // no rows, in the dtype of the GEMM
  Tensor dense_;
};

}  // namespace peft_kernels::cpu
