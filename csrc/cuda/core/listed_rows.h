// The tiles of rows of each expert or group, listed on the device for the kernels that follow on this stream.
#pragma once

#include <ATen/ATen.h>

#include <vector>

#include "row_tiles.h"
#include "runtime.h"

namespace peft_kernels::cuda {

class ListedRows {
 public:
  // `results` are zeroed in rows behind those of the last expert; at most two.
  ListedRows(const Tensor& ends, int64_t rows, int tile_rows, const std::vector<Tensor>& results = {}) {
    const int64_t experts = ends.size(0), tiles = ExpertRows::most_tiles(experts, rows, tile_rows);
    memory_ = at::empty({ExpertRows::bytes(experts, tiles)}, ends.options().dtype(at::kByte));
    char* start = static_cast<char*>(memory_.mutable_data_ptr());
    view_.experts = static_cast<int>(experts);
    view_.rows = static_cast<int>(rows);
    view_.tile_rows = tile_rows;
    view_.max_tiles = static_cast<int>(tiles);
    view_.tiles = reinterpret_cast<RowTile*>(start);
    view_.ranges = reinterpret_cast<RowRange*>(view_.tiles + tiles);
    view_.count = reinterpret_cast<int*>(view_.ranges + experts);
    ResultRows cleared[2] = {};
    for (size_t i = 0; i < results.size(); ++i) {
      const Tensor& result = results[i];
      cleared[i] = {result.mutable_data_ptr(), result.size(1) * static_cast<int64_t>(result.element_size())};
    }
    const Tensor own_ends = ends.contiguous();
    const CallContext context;
    list_expert_rows(view_, own_ends.const_data_ptr<int>(), cleared, context);
  }

  const ExpertRows& view() const { return view_; }

 private:
  Tensor memory_;
  ExpertRows view_{};
};

}  // namespace peft_kernels::cuda
