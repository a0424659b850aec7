// Checks of the arguments of a head's loss.
#pragma once

#include <ATen/ATen.h>

#include "checks.h"

namespace peft_kernels {

inline void check_loss(const Tensor& x, const Tensor& labels, int64_t vocabulary, const OptionalTensor& bias,
                       double softcap, double label_smoothing) {
  dtype_of(x, "x");
  TORCH_CHECK(x.dim() == 2, "x: expected 2 dimensions, got ", x.dim());
  check_dtype(labels, at::kLong, "labels");
  check_shape(labels, {x.size(0)}, "labels");
  TORCH_CHECK(vocabulary > 0, "vocabulary: expected 1 or more, got ", vocabulary);
  TORCH_CHECK(softcap >= 0, "softcap: expected 0 or more, got ", softcap);
  TORCH_CHECK(0 <= label_smoothing && label_smoothing <= 1, "label_smoothing: expected 0 to 1, got ",
              label_smoothing);
  if (bias) check_bias(*bias, vocabulary, x.scalar_type());
}

inline void check_loss_need_dx(bool need_dx, double softcap, double label_smoothing) {
  // The gradient of label smoothing is then not a multiple of the head's mean row.
  TORCH_CHECK(!(need_dx && softcap > 0 && label_smoothing > 0),
              "need_dx: expected False with both softcap and label_smoothing, got True");
}

// The adapter of a head: h [rows, r] = scaling x A^T, and B.
inline void check_loss_adapter(const OptionalTensor& h, const OptionalTensor& lora_b, int64_t rows,
                               int64_t vocabulary) {
  TORCH_CHECK(h.has_value() == lora_b.has_value(), "h, lora_b: expected both or neither, got one");
  if (!h) return;
  dtype_of(*h, "h");
  dtype_of(*lora_b, "lora_b");
  TORCH_CHECK(h->dim() == 2 && h->size(0) == rows, "h: expected shape [", rows, ", r], got ", h->sizes());
  check_shape(*lora_b, {vocabulary, h->size(1)}, "lora_b");
}

inline void check_loss_backward(const Tensor& of_label, const Tensor& of_p, const OptionalTensor& of_pz,
                                const Tensor& lse, int64_t rows, bool is_packed, bool has_bias,
                                bool has_adapter, bool need_dw, bool need_dbias, bool need_dh, bool need_db) {
  const auto check = [&](const Tensor& t, const char* name) {
    check_dtype(t, at::kFloat, name);
    check_shape(t, {rows}, name);
  };
  check(of_label, "of_label");
  check(of_p, "of_p");
  if (of_pz) check(*of_pz, "of_pz");
  check(lse, "lse");
  TORCH_CHECK(!need_dw || !is_packed, "need_dw: expected False with a packed weight, got True");
  TORCH_CHECK(!need_dbias || has_bias, "need_dbias: expected False without a bias, got True");
  TORCH_CHECK((!need_dh && !need_db) || has_adapter, "need_dh, need_db: expected False without h, got True");
}

}  // namespace peft_kernels
