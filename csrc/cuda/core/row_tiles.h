// Rows of activations sorted by expert, listed in tiles on the device. How many rows an expert has is known
// there alone: list_expert_rows() reads `ends` and writes the list, and grouped kernels take their tiles from
// it.
#pragma once

#include "kernels.h"

namespace peft_kernels::cuda {

// Rows [begin, end) of one expert.
struct alignas(16) RowTile {
  int begin, end, expert;
};
struct RowRange {
  int begin, end;
};

// Written on the device by list_expert_rows(), for all rows that have an expert, in order.
struct ExpertRows {
  int experts, rows;  // rows: including those after the last expert's
  int tile_rows;      // of a tile, at most
  int max_tiles;
  RowTile* tiles;  // [max_tiles], the first *count of which are used
  int* count;
  RowRange* ranges;  // [experts]
  int* ends;         // [experts], of the ranges

  static int64_t most_tiles(int64_t experts, int64_t rows, int64_t tile_rows) {
    return rows / tile_rows + std::min(experts, rows);
  }
  static int64_t bytes(int64_t experts, int64_t max_tiles) {
    return max_tiles * int64_t{sizeof(RowTile)} + experts * int64_t{sizeof(RowRange) + sizeof(int)} +
           int64_t{sizeof(int)};
  }
};

// A result whose rows after the last expert's are set to zero.
struct ResultRows {
  void* rows;  // or null
  int64_t row_bytes;
};

// `ends` [experts]: the row after the last one of each expert, ascending. Any values are safe: they are
// clamped.
void list_expert_rows(const ExpertRows& rows, const int* ends, const ResultRows (&results)[2],
                      const Context& context);
// Zeroes those rows of a result that exists later, once they are listed; they are multiples of 16 bytes.
void clear_rest(const ExpertRows& rows, const ResultRows& result, const Context& context);

}  // namespace peft_kernels::cuda
