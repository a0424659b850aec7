// Checked arguments of bottleneck adapters that serve different rows.
#pragma once

#include <ATen/ATen.h>

#include <initializer_list>

#include "checks.h"

namespace peft_kernels {

// Throws unless every list of an op's arguments has an item per adapter.
inline void check_counts(size_t adapters, std::initializer_list<size_t> sizes) {
  for (const size_t size : sizes) {
    TORCH_CHECK(size == adapters, "down: expected ", adapters, " of each like it, got ", size);
  }
}

// The adapter of each row, contiguous: its index, or any other number for none.
inline Tensor checked_row_group(const Tensor& row_group, int64_t rows) {
  TORCH_CHECK(row_group.scalar_type() == at::kLong || row_group.scalar_type() == at::kInt,
              "row_group: expected Long or Int, got ", row_group.scalar_type());
  check_device(row_group, "row_group");
  check_shape(row_group, {rows}, "row_group");
  return row_group.to(at::kLong).contiguous();
}

}  // namespace peft_kernels
