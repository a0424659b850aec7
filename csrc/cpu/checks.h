// Tensors to the views that kernels take. Everything that memory safety rests on is checked here.
#pragma once

#include <ATen/ATen.h>

#include <optional>

#include "../common/nf4.h"
#include "params.h"

namespace peft_kernels::cpu {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline void check_cpu(const Tensor& t, const char* name) {
  TORCH_CHECK(t.device().is_cpu(), name, ": expected a CPU tensor, got one on ", t.device());
}

inline DType dtype_of(const Tensor& t, const char* name) {
  check_cpu(t, name);
  switch (t.scalar_type()) {
    case at::kFloat:
      return DType::kF32;
    case at::kBFloat16:
      return DType::kBF16;
    case at::kHalf:
      return DType::kF16;
    default:
      TORCH_CHECK(false, name, ": expected float32, bfloat16 or float16, got ", t.scalar_type());
  }
}

inline void check_dtype(const Tensor& t, at::ScalarType expected, const char* name) {
  check_cpu(t, name);
  TORCH_CHECK(t.scalar_type() == expected, name, ": expected ", expected, ", got ", t.scalar_type());
}

inline void check_numel(const Tensor& t, int64_t expected, const char* name) {
  TORCH_CHECK(t.numel() == expected, name, ": expected ", expected, " elements, got ", t.numel());
}

inline void check_shape(const Tensor& t, at::IntArrayRef expected, const char* name) {
  TORCH_CHECK(t.sizes() == expected, name, ": expected shape ", expected, ", got ", t.sizes());
}

inline void check_bias(const Tensor& bias, int64_t features, at::ScalarType activation_dtype) {
  dtype_of(bias, "bias");
  TORCH_CHECK(bias.scalar_type() == at::kFloat || bias.scalar_type() == activation_dtype,
              "bias: expected Float or ", activation_dtype, ", got ", bias.scalar_type());
  check_shape(bias, {features}, "bias");
}

inline int block_shift_of(int64_t blocksize) {
  TORCH_CHECK(nf4::is_blocksize(blocksize), "blocksize: expected a power of two from ", nf4::kMinBlocksize,
              " to ", nf4::kMaxBlocksize, ", got ", blocksize);
  int shift = 0;
  while ((int64_t{1} << shift) < blocksize) ++shift;
  return shift;
}

inline int64_t rows_of(const Tensor& t) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) rows *= t.size(i);
  return rows;
}

// Leading sizes of t, then `last`.
inline at::DimVector sizes_with_last(const Tensor& t, int64_t last) {
  TORCH_CHECK(t.dim() >= 1, "x: expected at least 1 dimension, got 0");
  at::DimVector sizes(t.sizes());
  sizes.back() = last;
  return sizes;
}

// An activation of `features` values a row, made contiguous.
inline Tensor activation(const Tensor& t, int64_t features, const char* name) {
  dtype_of(t, name);
  TORCH_CHECK(t.dim() >= 1, name, ": expected at least 1 dimension, got 0");
  TORCH_CHECK(t.size(-1) == features, name, ": expected ", features, " features, got ", t.size(-1));
  return t.contiguous();
}

// An NF4 weight and the tensors that keep its bytes alive.
class Nf4Holder {
 public:
  Nf4Holder(const Tensor& packed, const Tensor& absmax, const OptionalTensor& absmax2,
            const OptionalTensor& offset, int64_t blocksize, int64_t numel) {
    view_.block_shift = block_shift_of(blocksize);
    check_dtype(packed, at::kByte, "packed");
    TORCH_CHECK(packed.numel() == (numel + 1) / 2, "packed: expected ", (numel + 1) / 2, " bytes, got ",
                packed.numel());
    const int64_t blocks = (numel + blocksize - 1) / blocksize;
    packed_ = packed.contiguous();
    absmax_ = absmax.contiguous();
    view_.packed = packed_.const_data_ptr<uint8_t>();
    TORCH_CHECK(absmax2.has_value() == offset.has_value(),
                "absmax2, offset: expected both or neither, got only one of them");
    if (absmax2) {
      check_dtype(absmax, at::kByte, "absmax");
      check_dtype(*absmax2, at::kFloat, "absmax2");
      check_dtype(*offset, at::kFloat, "offset");
      check_numel(*absmax2, (blocks + nf4::kAbsmaxBlock - 1) / nf4::kAbsmaxBlock, "absmax2");
      check_numel(*offset, 1, "offset");
      absmax2_ = absmax2->contiguous();
      view_.absmax = nullptr;
      view_.q8 = absmax_.const_data_ptr<uint8_t>();
      view_.absmax2 = absmax2_.const_data_ptr<float>();
      view_.offset = *offset->const_data_ptr<float>();
    } else {
      check_dtype(absmax, at::kFloat, "absmax");
      view_.absmax = absmax_.const_data_ptr<float>();
      view_.q8 = nullptr;
      view_.absmax2 = nullptr;
      view_.offset = 0.0f;
    }
    check_numel(absmax, blocks, "absmax");
  }
  Nf4Holder(const Nf4Holder&) = delete;
  Nf4Holder& operator=(const Nf4Holder&) = delete;

  const Nf4View& view() const { return view_; }
  // As a matrix with `cols` elements a row.
  MatrixView matrix(int64_t cols) const { return {nullptr, DType::kF32, cols, &view_}; }

 private:
  Tensor packed_, absmax_, absmax2_;
  Nf4View view_;
};

// A dense row-major matrix; the tensor must outlive the view.
inline MatrixView dense_matrix(const Tensor& t, const char* name) {
  return {t.const_data_ptr(), dtype_of(t, name), t.size(-1), nullptr};
}

}  // namespace peft_kernels::cpu
