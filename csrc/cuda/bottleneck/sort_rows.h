// Rows that belong to groups, in any order, sorted by group on the device: how many rows a group has is known
// there alone.
#pragma once

#include "../core/kernels.h"

namespace peft_kernels::cuda {

// order [rows]: the rows of group 0 in ascending order, then those of group 1, ..., and last those whose
// row_group is not 0 .. groups - 1. ends [groups + 1]: the position after the last row of each.
void sort_rows(const int64_t* row_group, int rows, int groups, int* order, int* ends, Stream stream);

}  // namespace peft_kernels::cuda
