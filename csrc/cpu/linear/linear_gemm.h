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
#include "weights.h"

namespace peft_kernels::cpu {

// lhs, as rows of its last dimension, times rhs. Both tensors must be contiguous and outlive the term.
inline GemmTerm term_of(const Tensor& lhs, const char* name, const MatrixView& rhs, float rhs_scale = 1.0f) {
  return {lhs.const_data_ptr(), dtype_of(lhs, name), lhs.size(-1), rhs, rhs_scale, lhs.size(-1)};
}

// Rows of lhs from `begin` on.
inline GemmTerm rows_term(const Tensor& lhs, const char* name, int64_t begin, const MatrixView& rhs,
                          float rhs_scale = 1.0f) {
  GemmTerm term = term_of(lhs, name, rhs, rhs_scale);
  term.lhs = element_ptr(lhs, begin * term.lhs_ld);
  return term;
}

// Sums over rows, as in the gradients of adapters, are formed in chunks of this many rows: one panel holds
// them.
inline constexpr int64_t kChunkRows = 256;

class Gemm {
 public:
  GemmParams params{};

  // Writes to all of a contiguous `out`, as rows of its last dimension.
  explicit Gemm(Tensor& out) : Gemm(out, 0, rows_of(out), 0, out.size(-1)) {}

  // Writes to rows [m_begin, m_end) and columns [n_begin, n_end) of `out`.
  Gemm(Tensor& out, int64_t m_begin, int64_t m_end, int64_t n_begin, int64_t n_end) {
    params.out_dtype = dtype_of(out, "out");
    params.out_ld = out.size(-1);
    params.out = mutable_element_ptr(out, m_begin * params.out_ld + n_begin);
    params.m = m_end - m_begin;
    params.n = n_end - n_begin;
  }

  // Starts the sums from a bias in fp32 or in the activations' dtype.
  void set_bias(const OptionalTensor& bias, at::ScalarType activation_dtype) {
    if (!bias) return;
    check_bias(*bias, params.n, activation_dtype);
    params.bias_dtype = dtype_of(*bias, "bias");
    bias_ = bias->contiguous();
    params.bias = bias_.const_data_ptr();
  }
  // The same for checked memory that outlives the GEMM.
  void set_bias(const void* bias, DType dtype) {
    params.bias_dtype = dtype;
    params.bias = bias;
  }
  void accumulate() { params.add_to_out = true; }
  // For run_nn: with few rows every task takes all of them, as filling a panel again would cost more.
  void keep_few_rows_in_one_task() {
    constexpr int64_t kFew = 128;
    if (params.m <= kFew) nn_row_unit_ = std::max<int64_t>(params.m, 1);
  }

  void add(const GemmTerm& term) { terms_.push_back(term); }
  // Adds columns @ rows, summed over rows [begin, end), where the output is [rank, features]: the gradient of
  // a small matrix, whose rank takes the place of the batch, so that features stay contiguous. `columns`
  // holds [rank, rows of the chunk] for each chunk, from element rank times the chunk's first row on.
  void add_row_sums(const Tensor& columns, int64_t rank, const Tensor& rows, int64_t begin, int64_t end) {
    for (; begin < end; begin += kChunkRows) {
      const int64_t count = std::min(kChunkRows, end - begin);
      MatrixView rhs = dense_matrix(rows, "rows");
      rhs.data = element_ptr(rows, begin * rows.size(1));
      add({element_ptr(columns, begin * rank), dtype_of(columns, "columns"), count, rhs, 1.0f, count});
    }
    keep_few_rows_in_one_task();
    keep_alive(columns);
    keep_alive(rows);
  }
  // Keeps the memory of a term alive until the GEMM has run.
  void keep_alive(const Tensor& t) { kept_alive_.push_back(t); }

  // Runs many GEMMs, none of which depends on another.
  static void run_nt_batch(std::vector<Gemm>& gemms) {
    run_batch(gemms, [](Gemm& gemm) { return gemm.nt_job(); });
  }
  static void run_nn_batch(std::vector<Gemm>& gemms) {
    run_batch(gemms, [](Gemm& gemm) { return gemm.nn_job(); });
  }

  // run_nt of many GEMMs with packed rows: the lhs of their first terms are rows of one tensor, of one depth.
  static void run_packed_nt_batch(std::vector<Gemm>& gemms, const at::TensorOptions& rows) {
    int64_t padded_rows = 0;
    Gemm* any_packed = nullptr;
    for (Gemm& gemm : gemms) {
      gemm.params.plan = kernels().plan_nt(gemm.complete_params());
      if (!gemm.is_packed()) continue;
      any_packed = &gemm;
      padded_rows += ceil_div(gemm.params.m, kPackAlign) * kPackAlign;
    }
    if (!any_packed) return run_nt_batch(gemms);
    const NtPlan plan = any_packed->params.plan;
    PackedBlocks blocks(padded_rows, any_packed->terms_[0].depth, plan, rows);
    std::vector<GemmJob> jobs;
    const auto run_block = [&] {
      blocks.pack();
      run_gemms(jobs.data(), jobs.size());
      blocks.clear();
      jobs.clear();
    };
    for (Gemm& gemm : gemms) {
      if (!gemm.is_packed()) {
        jobs.push_back(gemm.nt_job());
        continue;
      }
      const int64_t all = gemm.params.m;
      for (int64_t m = 0, end; m < all; m = end) {
        end = std::min(m + block_rows(plan), all);
        if (!blocks.fits(end - m)) run_block();
        jobs.push_back(
            gemm.packed_job(blocks.add(gemm.lhs_row(m), gemm.terms_[0].lhs_dtype, end - m), m, end));
      }
    }
    run_block();
  }

  void run_nt() { run(nt_job()); }
  void run_nn() { run(nn_job()); }

  // run_nt with `first` as the lhs of the first term. The other terms must be dense, with lhs in fp32 or,
  // where the ISA has pairs, both operands in bf16.
  void run_nt(const Rows& first) {
    params.plan = kernels().plan_nt(complete_params());
    if (!is_packed()) return run_nt();
    const int64_t block = block_rows(params.plan);
    for (int64_t m = 0; m < params.m; m += block) {
      run(packed_job(first.packed(m, params.plan), m, std::min(m + block, params.m)));
    }
  }

 private:
  GemmParams& complete_params() {
    params.terms = terms_.data();
    params.term_count = static_cast<int64_t>(terms_.size());
    return params;
  }
  const void* lhs_row(int64_t m) const {
    const GemmTerm& term = terms_[0];
    return static_cast<const char*>(term.lhs) + m * term.lhs_ld * (term.lhs_dtype == DType::kF32 ? 4 : 2);
  }
  bool is_packed() const { return params.plan != NtPlan::kDots && params.plan != NtPlan::kGemv; }

  GemmJob nt_job() { return {kernels().gemm_nt, complete_params(), 0, params.m, kernels().tile_rows, 16}; }
  GemmJob nn_job() { return {kernels().gemm_nn, complete_params(), 0, params.m, nn_row_unit_, 64}; }
  GemmJob packed_job(const void* packed, int64_t m_begin, int64_t m_end) {
    params.packed_lhs = packed;
    params.packed_begin = m_begin;
    params.packed_end = m_end;
    return {kernels().gemm_packed, complete_params(), m_begin, m_end, kPackRows, 48};
  }
  static void run(const GemmJob& job) { run_gemms(&job, 1); }

  template <class JobOf>
  static void run_batch(std::vector<Gemm>& gemms, const JobOf& job_of) {
    std::vector<GemmJob> jobs;
    jobs.reserve(gemms.size());
    for (Gemm& gemm : gemms) jobs.push_back(job_of(gemm));
    run_gemms(jobs.data(), jobs.size());
  }

  c10::SmallVector<GemmTerm, 4> terms_;
  Tensor bias_;
  int64_t nn_row_unit_ = kernels().tile_rows;
  c10::SmallVector<Tensor, 2> kept_alive_;
};

}  // namespace peft_kernels::cpu
