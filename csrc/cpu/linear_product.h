// A matrix product as the GEMM kernels take it, put together term by term from tensors.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/SmallVector.h>

#include <utility>
#include <vector>

#include "../common/checks.h"
#include "parallel.h"

namespace peft_kernels::cpu {

// lhs as rows of its last dimension, times rhs. Both tensors must be contiguous, and outlive the term.
inline GemmTerm term_of(const Tensor& lhs, const char* name, const MatrixView& rhs, float rhs_scale = 1.0f) {
  return {lhs.const_data_ptr(), dtype_of(lhs, name), lhs.size(-1), rhs, rhs_scale, lhs.size(-1), 0, INT64_MAX,
          DropoutMask{}};
}

// Activations as rows, and packed for gemm_packed once a product asks for that: a block of rows at a time, as
// a copy of them all would be fresh memory, and touching that costs more than packing.
class Rows {
 public:
  static int64_t block_rows(NtPlan plan) { return plan == NtPlan::kPairs ? 1024 : 256; }

  explicit Rows(Tensor rows) : rows_(std::move(rows)) {}
  const Tensor& tensor() const { return rows_; }

  // Rows [begin, begin + block_rows), as far as there are.
  const void* packed(int64_t begin, NtPlan plan) const {
    if (begin == packed_begin_ && plan == plan_) return packed_.const_data_ptr();
    const int64_t rows = std::min(block_rows(plan), rows_of(rows_) - begin), depth = rows_.size(-1);
    const int64_t padded = ceil_div(depth, kPackDepth) * kPackDepth;
    if (!packed_.defined() || plan != plan_) {
      const auto dtype = plan == NtPlan::kPairs ? at::kBFloat16 : at::kFloat;
      packed_ = at::empty({ceil_div(rows, kPackRows) * kPackRows * padded}, rows_.options().dtype(dtype));
    }
    const char* x = static_cast<const char*>(rows_.const_data_ptr());
    const PackParams params{x + begin * depth * rows_.element_size(),
                            dtype_of(rows_, "x"),
                            rows,
                            depth,
                            plan,
                            packed_.mutable_data_ptr()};
    const auto pack_strips = kernels().pack_strips;
    parallel_for(0, ceil_div(rows, kPackRows), ceil_div(kElementwiseGrain, kPackRows * padded),
                 [&](int64_t first, int64_t last) { pack_strips(params, first, last); });
    packed_begin_ = begin;
    plan_ = plan;
    return params.out;
  }

 private:
  Tensor rows_;
  mutable Tensor packed_;
  mutable NtPlan plan_ = NtPlan::kDots;
  mutable int64_t packed_begin_ = -1;
};

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
  // What a term points into, where its owner may be gone when the product is run.
  void keep(const Tensor& t) { kept_.push_back(t); }

  // run_nt of many products, of which each would be too small for all threads.
  static void run_nt_together(std::vector<Product>& products) {
    const int64_t few = 2 * kernels().multiply_adds_per_thread;
    bool small = static_cast<int64_t>(products.size()) >= get_num_threads();
    for (const Product& p : products) small &= p.params.m * p.params.n * p.terms_[0].depth < few;
    if (!small) {
      for (Product& product : products) product.run_nt();
      return;
    }
    const auto kernel = kernels().gemm_nt;
    parallel_for(0, static_cast<int64_t>(products.size()), 1, [&](int64_t begin, int64_t end) {
      void* scratch = checked_thread_scratch();
      for (int64_t i = begin; i < end; ++i) {
        GemmParams& params = products[i].finished();
        if (params.m > 0 && params.n > 0) kernel(params, {0, params.m, 0, params.n}, scratch);
      }
    });
  }

  void run_nt() { run(kernels().gemm_nt, 0, params.m, 6, 16); }
  void run_nn() { run(kernels().gemm_nn, 0, params.m, 6, 64); }

  // run_nt with `first` for the lhs of the first term; those of the others must be fp32, their rhs dense.
  void run_nt(const Rows& first) {
    params.plan = kernels().plan_nt(finished());
    if (params.plan == NtPlan::kDots || params.plan == NtPlan::kGemv) return run_nt();
    const int64_t block = Rows::block_rows(params.plan);
    for (int64_t m = 0; m < params.m; m += block) {
      params.packed_lhs = first.packed(m, params.plan);
      params.packed_begin = m;
      params.packed_end = std::min(m + block, params.m);
      run(kernels().gemm_packed, m, params.packed_end, kPackRows, 48);
    }
  }

 private:
  GemmParams& finished() {
    params.terms = terms_.data();
    params.term_count = static_cast<int64_t>(terms_.size());
    return params;
  }
  void run(GemmKernel kernel, int64_t m_begin, int64_t m_end, int64_t m_unit, int64_t n_unit) {
    run_gemm(kernel, finished(), m_begin, m_end, m_unit, n_unit);
  }

  c10::SmallVector<GemmTerm, 4> terms_;
  Tensor bias_;
  c10::SmallVector<Tensor, 2> kept_;
};

}  // namespace peft_kernels::cpu
