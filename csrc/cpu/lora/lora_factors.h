// h = x A^T of an adapter, or its gradient, converted for the GEMMs that follow.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <vector>

#include "../core/parallel.h"
#include "../linear/linear_gemm.h"
#include "lora_adapters.h"

namespace peft_kernels::cpu {

inline at::ScalarType factors_type(bool in_pairs) { return in_pairs ? at::kBFloat16 : at::kFloat; }

// The columns of one adapter in h, or in its gradient, times `scale` and in `dtype`. Rows that it does not
// serve are not read.
struct LoraFactors {
  Tensor rows;     // [m, rank], or undefined
  Tensor columns;  // as Gemm::add_row_sums takes them, or undefined
  int64_t rank;

  LoraFactors(const Tensor& h, const Adapter& adapter, float scale, at::ScalarType dtype, bool wants_rows,
              bool wants_columns)
      : LoraFactors(h, adapter.h_begin, adapter.rank(), adapter.runs, scale, dtype, wants_rows,
                    wants_columns) {}

  LoraFactors(const Tensor& h, int64_t h_begin, int64_t rank, const std::vector<RowRun>& runs, float scale,
              at::ScalarType dtype, bool wants_rows, bool wants_columns)
      : rank(rank) {
    const int64_t size = rows_of(h) * rank;
    const auto options = h.options().dtype(dtype);
    if (wants_rows) rows = at::empty({rows_of(h), rank}, options);
    if (wants_columns) columns = at::empty({size}, options);
    if (size == 0 || !(wants_rows || wants_columns)) return;
    const float* from = h.const_data_ptr<float>() + h_begin;
    const auto at = [&](const Tensor& t, int64_t row) -> void* {
      if (!t.defined()) return nullptr;
      return mutable_element_ptr(t, row * rank);
    };
    const DType out_dtype = dtype_of(wants_rows ? rows : columns, "h");
    std::vector<RowRun> chunks;
    for (const RowRun& run : runs) {
      for (int64_t begin = run.begin; begin < run.end; begin += kChunkRows) {
        chunks.push_back({begin, std::min(begin + kChunkRows, run.end)});
      }
    }
    const auto transpose_rows = kernels().transpose_rows;
    parallel_for(0, static_cast<int64_t>(chunks.size()), ceil_div(kElementwiseGrain, kChunkRows * rank),
                 [&](int64_t first, int64_t last) {
                   for (int64_t i = first; i < last; ++i) {
                     const int64_t begin = chunks[i].begin, count = chunks[i].end - begin;
                     const TransposeParams params{
                         from + begin * h.size(-1), DType::kF32, count, rank,  h.size(-1),
                         at(columns, begin),        out_dtype,   count, scale, at(rows, begin)};
                     transpose_rows(params, 0, count);
                   }
                 });
  }

  // Adds columns @ rows, summed over `runs`, to a GEMM whose output is [rank, features].
  void add_sums(Gemm& gemm, const Tensor& rows, const std::vector<RowRun>& runs) const {
    for (const RowRun& run : runs) gemm.add_row_sums(columns, rank, rows, run.begin, run.end);
  }
};

}  // namespace peft_kernels::cpu
