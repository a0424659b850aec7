// Checks of op arguments, shared by the compiled libraries. Memory safety rests on the checks here, in
// nf4_tensors.h and in lora_args.h.
#pragma once

#include <ATen/ATen.h>

#include <optional>

#include "codes.h"
#include "dtype.h"
#include "integers.h"

namespace peft_kernels {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

// Throws when `t` is not on this library's kind of device. Each library defines its own.
void check_device(const Tensor& t, const char* name);

inline DType dtype_of(const Tensor& t, const char* name) {
  check_device(t, name);
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
  check_device(t, name);
  TORCH_CHECK(t.scalar_type() == expected, name, ": expected ", expected, ", got ", t.scalar_type());
}

inline void check_numel(const Tensor& t, int64_t expected, const char* name) {
  TORCH_CHECK(t.numel() == expected, name, ": expected ", expected, " elements, got ", t.numel());
}

inline void check_shape(const Tensor& t, at::IntArrayRef expected, const char* name) {
  TORCH_CHECK(t.sizes() == expected, name, ": expected shape ", expected, ", got ", t.sizes());
}

// The dtype of a parameter, which is fp32 or that of the activations.
inline DType parameter_dtype(const Tensor& t, at::ScalarType activation_dtype, const char* name) {
  const DType dtype = dtype_of(t, name);
  TORCH_CHECK(t.scalar_type() == at::kFloat || t.scalar_type() == activation_dtype, name,
              ": expected Float or ", activation_dtype, ", got ", t.scalar_type());
  return dtype;
}

inline void check_bias(const Tensor& bias, int64_t features, at::ScalarType activation_dtype) {
  parameter_dtype(bias, activation_dtype, "bias");
  check_shape(bias, {features}, "bias");
}

inline int block_shift_of(int64_t layout) {
  TORCH_CHECK(is_layout(layout), "blocksize: expected a power of two from ", nf4::kMinBlocksize, " to ",
              nf4::kMaxBlocksize, ", got ", blocksize_of(layout), " for codes ", codes_of(layout));
  if (blocksize_of(layout) == 0) return kWholeRowShift;
  int shift = 0;
  while ((int64_t{1} << shift) < blocksize_of(layout)) ++shift;
  return shift;
}

inline int64_t rows_of(const Tensor& t) {
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < t.dim(); ++i) rows *= t.size(i);
  return rows;
}

// The address `index` elements after the first one.
inline const void* element_ptr(const Tensor& t, int64_t index) {
  return static_cast<const char*>(t.const_data_ptr()) + index * static_cast<int64_t>(t.element_size());
}
inline void* mutable_element_ptr(const Tensor& t, int64_t index) {
  return static_cast<char*>(t.mutable_data_ptr()) + index * static_cast<int64_t>(t.element_size());
}

// Leading sizes of t, then `last`.
inline at::DimVector sizes_with_last(const Tensor& t, int64_t last) {
  TORCH_CHECK(t.dim() >= 1, "x: expected at least 1 dimension, got 0");
  at::DimVector sizes(t.sizes());
  sizes.back() = last;
  return sizes;
}

// An activation with `features` values per row, made contiguous.
inline Tensor activation(const Tensor& t, int64_t features, const char* name) {
  dtype_of(t, name);
  TORCH_CHECK(t.dim() >= 1, name, ": expected at least 1 dimension, got 0");
  TORCH_CHECK(t.size(-1) == features, name, ": expected ", features, " features, got ", t.size(-1));
  return t.contiguous();
}

// The same as rows.
inline Tensor as_rows(const Tensor& t, int64_t features, const char* name) {
  const Tensor rows = activation(t, features, name);
  return rows.dim() == 2 ? rows : rows.view({rows_of(rows), features});
}

// Contiguous, with the shape and dtype of `like`.
inline Tensor matching(const Tensor& t, const Tensor& like, const char* name) {
  check_dtype(t, like.scalar_type(), name);
  check_shape(t, like.sizes(), name);
  return t.contiguous();
}

// A tensor like `t`, without elements unless it is needed.
inline Tensor empty_unless(bool need, const Tensor& t) {
  return need ? at::empty(t.sizes(), t.options()) : at::empty({0}, t.options());
}

// A new tensor in its final shape. Not a view: autograd forbids changing an op's views in place.
inline Tensor reshaped(const Tensor& t, at::IntArrayRef sizes) { return at::_unsafe_view(t, sizes); }

}  // namespace peft_kernels
