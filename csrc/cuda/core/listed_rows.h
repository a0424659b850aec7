// The tiles of rows of each expert or group, listed on the device for the kernels that follow on this stream.
#pragma once

#include <ATen/ATen.h>

#include <vector>

#include "row_tiles.h"
#include "runtime.h"

namespace peft_kernels::cuda {

class ListedRows {
 public:
  // `results`, at most two, are zeroed in the rows after those of the last expert, unless undefined.
  ListedRows(const Tensor& ends, int64_t rows, int tile_rows, const std::vector<Tensor>& results = {}) {
    const int64_t experts = ends.size(0), tiles = ExpertRows::most_tiles(experts, rows, tile_rows);
    memory_ = at::empty({ExpertRows::bytes(experts, tiles) / int64_t{sizeof(int)}}, ends.options());
    int* start = memory_.mutable_data_ptr<int>();
    view_.experts = static_cast<int>(experts);
    view_.rows = static_cast<int>(rows);
    view_.tile_rows = tile_rows;
    view_.max_tiles = static_cast<int>(tiles);
    view_.tiles = reinterpret_cast<RowTile*>(start);
    view_.ranges = reinterpret_cast<RowRange*>(view_.tiles + tiles);
    view_.ends = reinterpret_cast<int*>(view_.ranges + experts);
    view_.count = view_.ends + experts;
    ResultRows cleared[2] = {};
    size_t count = 0;
    for (const Tensor& result : results) {
      if (result.defined()) cleared[count++] = rows_of(result);
    }
    const Tensor own_ends = ends.contiguous();
    const CallContext context;
    list_expert_rows(view_, own_ends.const_data_ptr<int>(), cleared, context);
  }

  const ExpertRows& view() const { return view_; }
  // The same as the op's argument, but ascending, and from 0 to the number of rows.
  Tensor ends() const { return memory_.narrow(0, view_.ends - memory_.const_data_ptr<int>(), view_.experts); }
  // Zeroes the rows after those of the last expert.
  void clear_rest(const Tensor& result) const {
    const CallContext context;
    peft_kernels::cuda::clear_rest(view_, rows_of(result), context);
  }

 private:
  static ResultRows rows_of(const Tensor& result) {
    return {result.mutable_data_ptr(), result.size(1) * static_cast<int64_t>(result.element_size())};
  }

  Tensor memory_;
  ExpertRows view_{};
};

}  // namespace peft_kernels::cuda
