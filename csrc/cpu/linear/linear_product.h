// A GEMM for the kernels, put together from tensors term by term.
#pragma once

#include <ATen/ATen.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "../../common/checks.h"
#include "../core/parallel.h"
#include "packed_rows.h"

namespace peft_kernels::cpu {

// lhs, as rows of its last dimension, times rhs. Both tensors must be contiguous and outlive the term.
inline GemmTerm term_of(const Tensor& lhs, const char* name, const MatrixView& rhs, float rhs_scale = 1.0f) {
  return {lhs.const_data_ptr(), dtype_of(lhs, name), lhs.size(-1), rhs, rhs_scale, lhs.size(-1), 0, INT64_MAX,
          DropoutMask{}};
}

// Sums over rows, as in the gradients of adapters, are formed in chunks of this many rows: one panel holds
// them.
inline constexpr int64_t kChunkRows = 256;

class Product {
 public:
  GemmParams params{};

  // Writes to all of a contiguous `out`, as rows of its last dimension.
  explicit Product(Tensor& out) : Product(out, 0, rows_of(out), 0, out.size(-1)) {}

  // Writes to rows [m_begin, m_end) and columns [n_begin, n_end) of `out`.
  Product(Tensor& out, int64_t m_begin, int64_t m_end, int64_t n_begin, int64_t n_end) {
    params.out_dtype = dtype_of(out, "out");
    params.out_ld = out.size(-1);
    params.out = static_cast<char*>(out.mutable_data_ptr()) +
                 (m_begin * params.out_ld + n_begin) * static_cast<int64_t>(out.element_size());
    params.m = m_end - m_begin;
    params.n = n_end - n_begin;
  }

  // Starts the sums from a bias in fp32 or in the activations' dtype.
  void start_from(const OptionalTensor& bias, at::ScalarType activation_dtype) {
    if (!bias) return;
    check_bias(*bias, params.n, activation_dtype);
    params.bias_dtype = dtype_of(*bias, "bias");
    bias_ = bias->contiguous();
    params.bias = bias_.const_data_ptr();
  }
  // The same for checked memory that outlives the GEMM.
  void start_from(const void* bias, DType dtype) {
    params.bias_dtype = dtype;
    params.bias = bias;
  }
  void start_from_out() { params.add_to_out = true; }
  // For run_nn: with few rows every task takes all of them, as filling a panel again would cost more.
  void keep_few_rows_together() {
    constexpr int64_t kFew = 128;
    if (params.m <= kFew) nn_row_unit_ = std::max<int64_t>(params.m, 1);
  }

  void add(const GemmTerm& term) { terms_.push_back(term); }
  // Keeps the memory of a term alive until the GEMM has run.
  void keep(const Tensor& t) { kept_.push_back(t); }

  // Runs many GEMMs, none of which depends on another.
  static void run_nt_together(std::vector<Product>& products) {
    run_together(products, [](Product& p) { return p.nt_job(); });
  }
  static void run_nn_together(std::vector<Product>& products) {
    run_together(products, [](Product& p) { return p.nn_job(); });
  }

  // run_nt of many GEMMs with packed rows: the lhs of their first terms are rows of one tensor, of one depth.
  static void run_packed_nt_together(std::vector<Product>& products, const at::TensorOptions& rows) {
    int64_t padded_rows = 0;
    Product* some = nullptr;
    for (Product& product : products) {
      product.params.plan = kernels().plan_nt(product.finished());
      if (!product.is_packed()) continue;
      some = &product;
      padded_rows += ceil_div(product.params.m, kPackAlign) * kPackAlign;
    }
    if (!some) return run_nt_together(products);
    const NtPlan plan = some->params.plan;
    PackedBlocks blocks(padded_rows, some->terms_[0].depth, plan, rows);
    std::vector<GemmJob> jobs;
    const auto run_block = [&] {
      blocks.pack();
      run_gemms(jobs.data(), jobs.size());
      blocks.clear();
      jobs.clear();
    };
    for (Product& product : products) {
      if (!product.is_packed()) {
        jobs.push_back(product.nt_job());
        continue;
      }
      const int64_t all = product.params.m;
      for (int64_t m = 0, end; m < all; m = end) {
        end = std::min(m + block_rows(plan), all);
        if (!blocks.has_room_for(end - m)) run_block();
        jobs.push_back(
            product.packed_job(blocks.add(product.lhs_row(m), product.terms_[0].lhs_dtype, end - m), m, end));
      }
    }
    run_block();
  }

  void run_nt() { run(nt_job()); }
  void run_nn() { run(nn_job()); }

  // run_nt with `first` as the lhs of the first term. The other terms must be dense, with lhs in fp32 or,
  // where the ISA has pairs, both operands in bf16.
  void run_nt(const Rows& first) {
    params.plan = kernels().plan_nt(finished());
    if (!is_packed()) return run_nt();
    const int64_t block = block_rows(params.plan);
    for (int64_t m = 0; m < params.m; m += block) {
      run(packed_job(first.packed(m, params.plan), m, std::min(m + block, params.m)));
    }
  }

 private:
  GemmParams& finished() {
    params.terms = terms_.data();
    params.term_count = static_cast<int64_t>(terms_.size());
    return params;
  }
  const void* lhs_row(int64_t m) const {
    const GemmTerm& term = terms_[0];
    return static_cast<const char*>(term.lhs) + m * term.lhs_ld * (term.lhs_dtype == DType::kF32 ? 4 : 2);
  }
  bool is_packed() const { return params.plan != NtPlan::kDots && params.plan != NtPlan::kGemv; }

  GemmJob nt_job() { return {kernels().gemm_nt, finished(), 0, params.m, 6, 16}; }
  GemmJob nn_job() { return {kernels().gemm_nn, finished(), 0, params.m, nn_row_unit_, 64}; }
  GemmJob packed_job(const void* packed, int64_t m_begin, int64_t m_end) {
    params.packed_lhs = packed;
    params.packed_begin = m_begin;
    params.packed_end = m_end;
    return {kernels().gemm_packed, finished(), m_begin, m_end, kPackRows, 48};
  }
  static void run(const GemmJob& job) { run_gemms(&job, 1); }

  template <class JobOf>
  static void run_together(std::vector<Product>& products, const JobOf& job_of) {
    std::vector<GemmJob> jobs;
    jobs.reserve(products.size());
    for (Product& product : products) jobs.push_back(job_of(product));
    run_gemms(jobs.data(), jobs.size());
  }

  c10::SmallVector<GemmTerm, 4> terms_;
  Tensor bias_;
  int64_t nn_row_unit_ = 6;
  c10::SmallVector<Tensor, 2> kept_;
};

}  // namespace peft_kernels::cpu
