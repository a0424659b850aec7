// Describes matrices to TMA, which copies boxes of them into shared memory (copy_box() in hopper.cuh).
#pragma once

#include <cuda.h>

#include <cstdint>

namespace peft_kernels::cuda {

// A row-major matrix of elements of 1 or 2 bytes, 16-byte aligned like each of its rows, of which a copy
// takes box_rows by box_columns elements. The rows of a box are 32, 64 or 128 bytes, and swizzled by as many.
// Throws std::runtime_error on failure.
//
// Written where the caller has it: compilers do not align a returned one as the driver expects.
void map_matrix(const void* data, int element_bytes, int64_t rows, int64_t columns, int box_rows,
                int box_columns, CUtensorMap& map);

}  // namespace peft_kernels::cuda
