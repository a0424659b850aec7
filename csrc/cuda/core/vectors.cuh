// Consecutive elements of any float type as fp32, loaded and stored in vectors of at most 16 bytes.
#pragma once

#include "../../common/dtype.h"
#include "device.cuh"

namespace peft_kernels::cuda {

template <class T, int kWidth>
DEVICE void to_floats(const Vec<T, kWidth>& from, float* values) {
#pragma unroll
  for (int i = 0; i < kWidth; ++i) values[i] = to_float(from.v[i]);
}
// Rounds to nearest, ties to even; two 16-bit floats in one instruction.
template <class T, int kWidth>
DEVICE Vec<T, kWidth> from_floats(const float* values) {
  if constexpr (sizeof(T) == 2 && kWidth % 2 == 0) {
    Vec<uint32_t, kWidth / 2> pairs;
#pragma unroll
    for (int i = 0; i < kWidth / 2; ++i) pairs.v[i] = pack2<T>(values[2 * i], values[2 * i + 1]);
    return bit_cast<Vec<T, kWidth>>(pairs);
  } else {
    Vec<T, kWidth> to;
#pragma unroll
    for (int i = 0; i < kWidth; ++i) to.v[i] = from_float<T>(values[i]);
    return to;
  }
}
template <class T, int kWidth>
DEVICE void round_floats(float (&values)[kWidth]) {
  to_floats(from_floats<T, kWidth>(values), values);
}

namespace detail {
template <class T, int kWidth>
inline constexpr int kPart = kWidth * sizeof(T) <= 16 ? kWidth : 16 / sizeof(T);
}  // namespace detail

// kConstant: from global memory that is not written while the kernel runs.
template <bool kConstant = true, class T, int kWidth>
DEVICE void load_floats(const T* from, float (&values)[kWidth]) {
  constexpr int kPart = detail::kPart<T, kWidth>;
#pragma unroll
  for (int i = 0; i < kWidth; i += kPart) {
    const auto* part = reinterpret_cast<const Vec<T, kPart>*>(from + i);
    to_floats(kConstant ? load_constant(part) : load(part), values + i);
  }
}
template <class T, int kWidth>
DEVICE void store_floats(T* to, const float (&values)[kWidth]) {
  constexpr int kPart = detail::kPart<T, kWidth>;
#pragma unroll
  for (int i = 0; i < kWidth; i += kPart) {
    store(reinterpret_cast<Vec<T, kPart>*>(to + i), from_floats<T, kPart>(values + i));
  }
}

// Calls body with a value of a dtype that the kernel is not compiled for:
// with_any_type(dtype, [&](auto type) { .. decltype(type) .. }).
template <class Body>
DEVICE void with_any_type(DType dtype, const Body& body) {
  if (dtype == DType::kF32) return body(float{});
  dtype == DType::kBF16 ? body(bf16{}) : body(fp16{});
}
// The same for T or fp32, or any where T is fp32.
template <class T, class Body>
DEVICE void with_wider_type(DType dtype, const Body& body) {
  if constexpr (sizeof(T) == sizeof(float)) {
    with_any_type(dtype, body);
  } else {
    dtype == DType::kF32 ? body(float{}) : body(T{});
  }
}

}  // namespace peft_kernels::cuda
