// Sorts rows by group (see sort_rows.h).
#pragma once

#include "../core/launch.cuh"
#include "sort_rows.h"

namespace peft_kernels::cuda {

// A block per group, the last one for rows of none. Each counts the rows of the groups before its own, and
// then lists its own rows after those.
struct SortRows {
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerSm = 4;
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr int kEach = 8;  // consecutive rows of a thread, at a time

  struct Params {
    const int64_t* row_group;
    int rows, groups;
    int* order;
    int* ends;
  };
  struct Shared {
    int sums[kWarps];
  };

  static DEVICE void run(const Params& p) {
    const int group = block_index();
    Shared* shared = shared_memory<Shared>();
    int before = 0;
    for (int row = thread_index(); row < p.rows; row += kThreads) before += group_of(p, row) < group;
    int end = place(*shared, before).total;
    for (int first = 0; first < p.rows; first += kThreads * kEach) {
      const int row = first + thread_index() * kEach;
      uint32_t mine = 0;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        if (row + i < p.rows && group_of(p, row + i) == group) mine |= 1u << i;
      }
      const Place found = place(*shared, __popc(mine));
      int at = end + found.before;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        if (mine >> i & 1) store(p.order + at++, row + i);
      }
      end += found.total;
    }
    if (thread_index() == 0) store(p.ends + group, end);
  }

 private:
  struct Place {
    int before, total;  // the sum of the counts of earlier threads, and of all
  };

  static DEVICE int group_of(const Params& p, int row) {
    const auto group = static_cast<int64_t>(load_constant(p.row_group + row));
    return group < 0 || group >= p.groups ? p.groups : static_cast<int>(group);
  }

  // Called by all threads.
  static DEVICE Place place(Shared& shared, int count) {
    const int warp = thread_index() / kWarp;
    int sum = count;  // of the warp, inclusive
#pragma unroll
    for (int step = 1; step < kWarp; step *= 2) {
      const int earlier = __shfl_up_sync(kAllLanes, sum, step);
      if (lane_index() >= step) sum += earlier;
    }
    if (lane_index() == kWarp - 1) store(&shared.sums[warp], sum);
    __syncthreads();
    Place found{sum - count, 0};
#pragma unroll
    for (int other = 0; other < kWarps; ++other) {
      const int of_warp = load(&shared.sums[other]);
      if (other < warp) found.before += of_warp;
      found.total += of_warp;
    }
    __syncthreads();
    return found;
  }
};

}  // namespace peft_kernels::cuda
