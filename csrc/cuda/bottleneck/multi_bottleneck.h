// Bottleneck adapters that serve different rows of a batch (multi_bottleneck.cu): the kernels of bottleneck.h
// with another mapping of rows to adapters. Which rows an adapter serves is known on the device alone.
#pragma once

#include <vector>

#include "../core/row_tiles.h"
#include "bottleneck.h"

namespace peft_kernels::cuda {

// Rows sorted by adapter, on the device: see sort_rows(). The last group has the rows of no adapter.
struct GroupedRows {
  const int* order;   // [m]
  ExpertRows listed;  // the tiles and ranges of positions in `order`
};

// Adapter i serves the rows of group i. Adapters have the m, k, n and dtype given here, and at most as many
// ranks as takes_ranks() allows.
struct MultiBottleneckView {
  DType dtype;
  int64_t k, n;
  int64_t ranks;  // of the widest adapter
  GroupedRows rows;
  std::vector<BottleneckView> adapters;
};

// The rows of a tile in GroupedRows.
int multi_bottleneck_tile_rows();

// As bottleneck() and bottleneck_backward(), in one launch for every 32 adapters. Matrices between the GEMMs
// are [m, ranks], of which an adapter uses the first columns; nothing else is written. A row of no adapter is
// a copy of its residual or term, or zeros.
void multi_bottleneck(const MultiBottleneckView& view, const void* x, const void* residual, float* z, void* y,
                      Stream stream);
void multi_bottleneck_backward(const MultiBottleneckView& view, const void* dy, const float* z,
                               const void* term, float* value, float* dz, void* dx, Stream stream);

struct GroupSum {
  float* out;  // [columns], or null: not needed
  int columns;
  float scale;
};

// out = scale * the sum of the first columns of a group's rows of x, with `ld` elements from a row to the
// next; one per adapter.
void sum_groups(const GroupedRows& rows, const void* x, DType dtype, int64_t ld,
                const std::vector<GroupSum>& sums, Stream stream);

}  // namespace peft_kernels::cuda
