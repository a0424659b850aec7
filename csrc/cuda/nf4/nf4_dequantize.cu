// Dequantises any part of an NF4 weight: whole units by DequantizeNf4, the rest by DequantizeElements.
#include <algorithm>

#include "../core/launch.cuh"
#include "nf4.h"
#include "nf4_dequantize.cuh"

namespace peft_kernels::cuda {
namespace {

// Magic numbers for division by `units` >= 2 (or for a single row), exact for every unit index below 2^31
// (Granlund and Montgomery 1994).
RowsOfUnits rows_of_units(int64_t rows, int64_t units) {
  if (rows == 1) return {static_cast<uint32_t>(units), 0, 0};
  int shift = 0;
  while ((int64_t{2} << shift) < units) ++shift;
  const int64_t factor = ceil_div(int64_t{1} << (32 + shift), units);
  return {static_cast<uint32_t>(units), static_cast<uint32_t>(factor), shift};
}

// rows x cols elements of the flat weight, starting at `first`, written to out.
template <class T>
struct Block {
  int64_t first, ld;
  int64_t rows, cols;
  T* out;
  int64_t out_stride;
};

// Whether the block consists of whole units, as DequantizeNf4 requires.
template <class T>
bool has_units(const Nf4View& weight, const Block<T>& part) {
  using Kernel = DequantizeNf4<T>;
  constexpr int64_t kUnit = Kernel::kUnit, kVector = kUnit / Kernel::kStores, kIndices = int64_t{1} << 32;
  return are_aligned({weight.packed}, 4) && are_aligned({part.out}) && part.first % kUnit == 0 &&
         part.cols % kUnit == 0 &&
         (part.rows == 1 || (part.cols > kUnit && part.ld % kUnit == 0 && part.out_stride % kVector == 0)) &&
         (part.first + part.rows * std::max(part.ld, part.cols)) / kUnit < kIndices &&
         part.rows * std::max(part.out_stride, part.cols) / kVector < kIndices &&
         part.rows * part.cols / kUnit <= kIndices / 2;
}

template <class T>
void launch_elements(const Nf4View& weight, const Block<T>& part, Stream stream) {
  using Kernel = DequantizeElements<T>;
  launch<Kernel>({weight, part.first, part.ld, part.rows, part.cols, part.out, part.out_stride},
                 ceil_div(part.rows * part.cols, Kernel::kThreads * Kernel::kElements), stream,
                 sizeof(typename Kernel::Shared));
}

// Of a block that has_units().
template <class T>
DequantizeParams<T> params_of(const Nf4View& weight, const Block<T>& part) {
  using Params = DequantizeParams<T>;
  constexpr int64_t kUnit = Params::kUnit, kVector = kUnit / Params::kStores;
  Params params{};
  params.weight = weight;
  params.rows = rows_of_units(part.rows, part.cols / kUnit);
  params.units = static_cast<uint32_t>(part.rows * params.rows.units);
  params.first = static_cast<uint32_t>(part.first / kUnit);
  params.ld = static_cast<uint32_t>(part.ld / kUnit);
  params.out = reinterpret_cast<typename Params::Elements*>(part.out);
  params.out_stride = static_cast<uint32_t>(part.out_stride / kVector);
  return params;
}

// Blocks that decode so many units.
template <class T>
int64_t blocks_of(uint32_t units) {
  return ceil_div(units, DequantizeNf4<T>::kThreads * DequantizeNf4<T>::kUnits);
}

template <class T>
void launch_part(const Nf4View& weight, const Block<T>& part, Stream stream) {
  if (!has_units(weight, part)) return launch_elements(weight, part, stream);
  const DequantizeParams<T> params = params_of(weight, part);
  const auto run = [&](auto kernel) {
    using Kernel = decltype(kernel);
    launch<Kernel>(params, blocks_of<T>(params.units), stream, sizeof(typename Kernel::Shared));
  };
  weight.is_nf4() ? run(DequantizeNf4<T>{}) : run(DequantizeAny<T>{});
}

// One row of any length; the elements after the last whole unit get their own launch.
template <class T>
void launch_row(const Nf4View& weight, Block<T> row, Stream stream) {
  constexpr int64_t kUnit = DequantizeNf4<T>::kUnit, kMost = int64_t{1} << 30;
  while (row.cols > 0) {
    Block<T> part = row;
    part.cols = row.cols < kUnit ? row.cols : std::min(row.cols / kUnit * kUnit, kMost);
    launch_part(weight, part, stream);
    row.first += part.cols;
    row.out += part.cols;
    row.cols -= part.cols;
  }
}

}  // namespace

void dequantize_nf4(const Nf4View& weight, const Part& part, void* out, DType dtype, int64_t out_stride,
                    Stream stream) {
  int64_t rows = part.row_end - part.row_begin, cols = part.col_end - part.col_begin;
  if (rows == 0 || cols == 0) return;
  if (cols == part.ld && out_stride == part.ld) {
    // Contiguous rows: one long row, of any length.
    cols *= rows;
    rows = 1;
  }
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    const Block<T> all{
        part.row_begin * part.ld + part.col_begin, part.ld, rows, cols, static_cast<T*>(out), out_stride};
    rows == 1 ? launch_row(weight, all, stream) : launch_part(weight, all, stream);
  });
}

void dequantize_experts(const ManyNf4& weights, int64_t experts, const Part& part, void* out, Stream stream) {
  using T = bf16;
  int64_t rows = part.row_end - part.row_begin, cols = part.col_end - part.col_begin;
  const int64_t elements = rows * cols;
  if (cols == part.ld) cols = elements, rows = 1;
  DequantizeManyParams params{};
  params.first = params_of<T>(weights.first, {part.row_begin * part.ld + part.col_begin, part.ld, rows, cols,
                                              static_cast<T*>(out), cols});
  params.blocks = static_cast<uint32_t>(blocks_of<T>(params.first.units));
  params.packed_stride = weights.packed_stride;
  params.code_stride = weights.code_stride;
  params.scale_stride = weights.scale_stride;
  params.values_stride = weights.values_stride;
  params.out_stride = elements / DequantizeNf4<T>::kUnit;
  const auto run = [&](auto kernel) {
    using Kernel = decltype(kernel);
    launch<Kernel>(params, experts * params.blocks, stream, sizeof(typename Kernel::Shared));
  };
  weights.first.is_nf4() ? run(DequantizeExperts{}) : run(DequantizeAnyExperts{});
}

void unpack_absmax(const uint8_t* q8, const float* absmax2, const float* offset, int64_t blocks,
                   float* absmax, Stream stream) {
  launch<UnpackAbsmax>({q8, absmax2, offset, blocks, absmax},
                       ceil_div(blocks, UnpackAbsmax::kThreads * UnpackAbsmax::kPerThread), stream,
                       sizeof(UnpackAbsmax::Shared));
}

}  // namespace peft_kernels::cuda
