// What lies between the two products of an adapter, as the products that come next take it.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>
#include <vector>

#include "linear_product.h"
#include "lora_adapters.h"
#include "parallel.h"

namespace peft_kernels::cpu {

// The rows that an adapter serves, chunk by chunk.
inline std::vector<RowRun> chunks_of(const Adapter& adapter) {
  std::vector<RowRun> chunks;
  for (const RowRun& run : adapter.runs) {
    for (int64_t begin = run.begin; begin < run.end; begin += kChunkRows) {
      chunks.push_back({begin, std::min(begin + kChunkRows, run.end)});
    }
  }
  return chunks;
}

// The columns of an adapter in h, or in its gradient, times `scale` and in `dtype`. Rows that it does not
// serve are left as they are found.
struct LoraFactors {
  Tensor rows;     // [m, rank], or undefined
  Tensor columns;  // [rank, rows of the chunk] from rank times the chunk's first row on; or undefined

  LoraFactors(const Tensor& h, const Adapter& adapter, float scale, at::ScalarType dtype, bool wants_rows,
              bool wants_columns) {
    const int64_t rank = adapter.rank(), size = rows_of(h) * rank;
    const auto options = h.options().dtype(dtype);
    if (wants_rows) rows = at::empty({rows_of(h), rank}, options);
    if (wants_columns) columns = at::empty({size}, options);
    if (size == 0 || !(wants_rows || wants_columns)) return;
    const float* from = h.const_data_ptr<float>() + adapter.h_begin;
    const auto at = [&](const Tensor& t, int64_t row) -> void* {
      if (!t.defined()) return nullptr;
      return static_cast<char*>(t.mutable_data_ptr()) + row * rank * static_cast<int64_t>(t.element_size());
    };
    const DType out_dtype = dtype_of(wants_rows ? rows : columns, "h");
    const std::vector<RowRun> chunks = chunks_of(adapter);
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
};

}  // namespace peft_kernels::cpu
