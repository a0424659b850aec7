// Dequantises any part of a weight in int4, E4M3 or int8.
#include <algorithm>

#include "../core/launch.cuh"
#include "nf4_groups.cuh"

namespace peft_kernels::cuda {
namespace {

constexpr int kVectorRun = 8;
constexpr int64_t kMostRuns = int64_t{1} << 31;  // of a launch: indices have 32 bits

template <class T, class Codes, int kRun>
void launch_runs(const GroupsView& weight, const Part& part, T* out, int64_t out_stride, Stream stream) {
  using Kernel = DequantizeGroups<T, Codes, kRun>;
  const int64_t rows = part.row_end - part.row_begin, in_row = (part.col_end - part.col_begin) / kRun;
  const int64_t most = std::max<int64_t>(kMostRuns / in_row, 1);
  for (int64_t row = 0; row < rows; row += most) {
    const int64_t count = std::min(most, rows - row);
    Part piece = part;
    piece.row_begin = part.row_begin + row;
    piece.row_end = piece.row_begin + count;
    const auto runs = static_cast<uint32_t>(count * in_row);
    launch<Kernel>({weight, piece, static_cast<uint32_t>(in_row), runs, out + row * out_stride, out_stride},
                   ceil_div(runs, Kernel::kThreads * Kernel::kRuns), stream, 0);
  }
}

template <class T, class Codes>
void launch_part(const GroupsView& weight, const Part& part, T* out, int64_t out_stride, Stream stream) {
  const auto is_whole = [](int64_t size) { return size % kVectorRun == 0; };
  const bool has_vectors = are_aligned({weight.packed}, 8) && are_aligned({out}) &&
                           is_whole(part.col_begin) && is_whole(part.col_end) && is_whole(part.ld) &&
                           is_whole(out_stride);
  has_vectors ? launch_runs<T, Codes, kVectorRun>(weight, part, out, out_stride, stream)
              : launch_runs<T, Codes, 1>(weight, part, out, out_stride, stream);
}

}  // namespace

void dequantize_groups(const GroupsView& weight, const Part& part, void* out, DType dtype, int64_t out_stride,
                       Stream stream) {
  if (part.row_end == part.row_begin || part.col_end == part.col_begin) return;
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    T* const to = static_cast<T*>(out);
    if (weight.has_int8) return launch_part<T, Int8>(weight, part, to, out_stride, stream);
    weight.has_bytes ? launch_part<T, E4M3>(weight, part, to, out_stride, stream)
                     : launch_part<T, Int4>(weight, part, to, out_stride, stream);
  });
}

}  // namespace peft_kernels::cuda
