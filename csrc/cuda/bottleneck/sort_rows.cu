// Launches SortRows.
#include "sort_rows.cuh"

namespace peft_kernels::cuda {

void sort_rows(const int64_t* row_group, int rows, int groups, int* order, int* ends, Stream stream) {
  launch<SortRows>({row_group, rows, groups, order, ends}, int64_t{groups} + 1, stream,
                   sizeof(SortRows::Shared));
}

}  // namespace peft_kernels::cuda
