// Lists the tiles of rows of each expert, for grouped GEMMs (see row_tiles.h).
#pragma once

#include "launch.cuh"
#include "row_tiles.h"

namespace peft_kernels::cuda {

// Zeroes the rows of a result from `first` on: all blocks of kThreads threads take part, and each thread
// stores a T at a time. Rows are whole Ts.
template <class T, int kThreads>
DEVICE void clear_rows(const ResultRows& result, int first, int rows) {
  auto* start = static_cast<uint8_t*>(result.rows);
  constexpr int64_t kBytes = sizeof(T);
  const int64_t stride = int64_t{grid_size()} * kThreads * kBytes, end = rows * result.row_bytes;
  int64_t at = first * result.row_bytes + (int64_t{block_index()} * kThreads + thread_index()) * kBytes;
  for (; at < end; at += stride) store(reinterpret_cast<T*>(start + at), T{});
}

// A warp of the first block writes the list. All blocks zero the rows that belong to no expert.
struct ListExpertRows {
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerSm = 4;

  struct Params {
    ExpertRows rows;
    const int* ends;
    ResultRows results[2];
  };

  static DEVICE void run(const Params& p) {
    if (block_index() == 0 && thread_index() < kWarp) list(p);
    const int last = clamped(p, load_constant(p.ends + p.rows.experts - 1));
#pragma unroll
    for (const ResultRows& result : p.results) {
      if (result.rows == nullptr) continue;
      result.row_bytes % 16 == 0 ? clear_rows<Words4, kThreads>(result, last, p.rows.rows)
                                 : clear_rows<uint16_t, kThreads>(result, last, p.rows.rows);
    }
  }

 private:
  static DEVICE int clamped(const Params& p, int end) {
    return end < 0 ? 0 : end < p.rows.rows ? end : p.rows.rows;
  }

  static DEVICE void list(const Params& p) {
    const int lane = lane_index(), tile_rows = p.rows.tile_rows;
    int begin = 0, count = 0;  // of the next experts
    for (int first = 0; first < p.rows.experts; first += kWarp) {
      const int expert = first + lane;
      int end = expert < p.rows.experts ? clamped(p, load_constant(p.ends + expert)) : 0;
      if (end < begin) end = begin;
      // A running maximum: ends that do not ascend would make experts share rows.
#pragma unroll
      for (int step = 1; step < kWarp; step *= 2) {
        const int before = __shfl_up_sync(kAllLanes, end, step);
        if (lane >= step && end < before) end = before;
      }
      const int end_before = __shfl_up_sync(kAllLanes, end, 1);
      const int own_begin = lane == 0 ? begin : end_before;
      const int tiles = (end - own_begin + tile_rows - 1) / tile_rows;
      int sum_of_tiles = tiles;  // inclusive prefix sum of tiles
#pragma unroll
      for (int step = 1; step < kWarp; step *= 2) {
        const int before = __shfl_up_sync(kAllLanes, sum_of_tiles, step);
        if (lane >= step) sum_of_tiles += before;
      }
      if (expert < p.rows.experts) {
        store(reinterpret_cast<Words2*>(p.rows.ranges + expert),
              {static_cast<uint32_t>(own_begin), static_cast<uint32_t>(end)});
        store(p.rows.ends + expert, end);
        RowTile* tile = p.rows.tiles + count + sum_of_tiles - tiles;
        for (int row = own_begin; row < end; row += tile_rows, ++tile) {
          const int tile_end = row + tile_rows < end ? row + tile_rows : end;
          store(reinterpret_cast<Words4*>(tile), {static_cast<uint32_t>(row), static_cast<uint32_t>(tile_end),
                                                  static_cast<uint32_t>(expert), 0});
        }
      }
      begin = __shfl_sync(kAllLanes, end, kWarp - 1);
      count += __shfl_sync(kAllLanes, sum_of_tiles, kWarp - 1);
    }
    if (lane == 0) store(p.rows.count, count);
  }
};

struct ClearRest {
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerSm = 4;

  struct Params {
    ExpertRows rows;
    ResultRows result;
  };

  static DEVICE void run(const Params& p) {
    clear_rows<Words4, kThreads>(p.result, load_constant(p.rows.ends + p.rows.experts - 1), p.rows.rows);
  }
};

// An entry of the list of tiles.
DEVICE RowTile load_row_tile(const ExpertRows& rows, int tile) {
  const Words4 words = load_constant(reinterpret_cast<const Words4*>(rows.tiles + tile));
  return {static_cast<int>(words.v[0]), static_cast<int>(words.v[1]), static_cast<int>(words.v[2])};
}

}  // namespace peft_kernels::cuda
