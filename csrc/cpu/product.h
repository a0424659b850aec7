// A matrix product as the GEMM kernels take it, put together term by term from tensors.
#pragma once

#include <c10/util/SmallVector.h>

#include "checks.h"
#include "parallel.h"

namespace peft_kernels::cpu {

// lhs as rows of its last dimension, times rhs. Both tensors must be contiguous, and outlive the term.
inline GemmTerm term_of(const Tensor& lhs, const char* name, const MatrixView& rhs, float rhs_scale = 1.0f) {
  return {lhs.const_data_ptr(), dtype_of(lhs, name), lhs.size(-1), rhs, rhs_scale, lhs.size(-1), 0, INT64_MAX,
          DropoutMask{}};
}

class Product {
 public:
  GemmParams params{};

  // Into all of a contiguous `out`, as rows of its last dimension.
  explicit Product(Tensor& out) : Product(out, 0, rows_of(out), 0, out.size(-1)) {}

  // Into the part of `out` in rows [m_begin, m_end) and columns [n_begin, n_end).
  Product(Tensor& out, int64_t m_begin, int64_t m_end, int64_t n_begin, int64_t n_end) {
    params.out_dtype = dtype_of(out, "out");
    params.out_ld = out.size(-1);
    params.out = static_cast<char*>(out.mutable_data_ptr()) +
                 (m_begin * params.out_ld + n_begin) * static_cast<int64_t>(out.element_size());
    params.m = m_end - m_begin;
    params.n = n_end - n_begin;
  }

  // What the sums start from: the bias, fp32 or of the activations' type.
  void start_from(const OptionalTensor& bias, at::ScalarType activation_dtype) {
    if (!bias) return;
    check_bias(*bias, params.n, activation_dtype);
    params.bias_dtype = dtype_of(*bias, "bias");
    bias_ = bias->contiguous();
    params.bias = bias_.const_data_ptr();
  }
  void start_from_out() { params.add_to_out = true; }

  void add(const GemmTerm& term) { terms_.push_back(term); }

  void run_nt() { run(kernels().gemm_nt, 16); }
  void run_nn() { run(kernels().gemm_nn, 64); }

 private:
  void run(GemmKernel kernel, int64_t n_unit) {
    params.terms = terms_.data();
    params.term_count = static_cast<int64_t>(terms_.size());
    run_gemm(kernel, params, n_unit);
  }

  c10::SmallVector<GemmTerm, 4> terms_;
  Tensor bias_;
};

}  // namespace peft_kernels::cpu
