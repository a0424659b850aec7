// From activations to ranks: h = x A^T and dH = s dY B of several adapters, in fp32.
#pragma once

#include "../core/row_tiles.cuh"
#include "../core/sum_splits.cuh"
#include "lora_fragments.cuh"

namespace peft_kernels::cuda {

struct ShrinkTile : RankTile {
  const void* factor;  // A from the row of the first rank on; or B from its column on
  int64_t ld;          // elements from one row of the factor to the next
  bool is_f32;
};

// out[m, column + rank] = scale * the sum over features of mask(x)[m, feature] * factor[rank, feature]; 0 in
// rows that the tile's adapter does not serve. kTransposed: the factor is stored as [feature, rank]. Features
// may be split over blocks; the last block to arrive adds the splits in order.
//
// Only sums go through shared memory: a warp has 16 rows and loads its operands in the layout of the tensor
// core. Lane (g, t) holds features 8t .. 8t + 7 of rows g and g + 8, and of rank g, of a window of 32; any
// order of features will do, as they are summed. Warps of a block with different rows read the same factors,
// from L1.
//
// kExperts: blocks have tiles of rows from a list on the device, and each expert has its factor.
template <class T, bool kVector, bool kTransposed, bool kExperts>
struct LoraShrinkOf {
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerSm = 2;
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr int kRows = 16;  // of a warp
  static constexpr int kTiles = 8;  // of a block
  static constexpr int kMaxTiles = 48;

  struct Params {
    const T* x;
    int64_t m, features;
    const int64_t* row_group;  // or null: all rows are served
    float* out;
    int64_t out_ld;
    float* partial;     // [splits, m, out_ld]
    uint32_t* counter;  // [blocks / splits] of a launch
    int64_t row_blocks;
    int splits;
    int row_warps;  // per block, a power of two; the others have other features
    int tiles;
    ShrinkTile tile[kMaxTiles];
    ExpertRows experts;     // with tiles of row_warps * kRows rows; row_blocks is their maximum number
    int64_t factor_stride;  // from an expert's factor to the next's
  };
  struct Shared {
    // The pad spreads the pairs of a half warp over all banks.
    float sum[kWarps][kRows][8 * kTiles + 8];
    uint32_t last;
  };

  static DEVICE void run(const Params& p) {
    const int warp = warp_index(), g = lane_index() / 4, t = lane_index() % 4;
    const int64_t row_block = block_index() % p.row_blocks;
    const int split = static_cast<int>(block_index() / p.row_blocks % p.splits);
    const int first_tile = static_cast<int>(block_index() / p.row_blocks / p.splits) * kTiles;
    const int slices = kWarps / p.row_warps;  // of the features, in this block
    const int slice = split * slices + warp / p.row_warps;
    int64_t rows = row_block * p.row_warps * kRows;  // the block's first
    int64_t rows_end = p.m, factor_begin = 0;
    if constexpr (kExperts) {
      if (row_block >= load_constant(p.experts.count)) return;
      const RowTile tile = load_row_tile(p.experts, static_cast<int>(row_block));
      rows = tile.begin;
      rows_end = tile.end;
      factor_begin = tile.expert * p.factor_stride;
    }
    const int64_t row = rows + warp % p.row_warps * kRows + g;
    const int64_t windows = (p.features + kWindow - 1) / kWindow;
    const int64_t begin = windows * slice / (slices * p.splits);
    const int64_t end = windows * (slice + 1) / (slices * p.splits);

    float sums[kTiles][4] = {};
    const uint32_t serving = serving_tiles(p, first_tile, row, rows_end);
    if (serving != 0) {
      const T* x[2] = {p.x + row * p.features, p.x + (row + 8) * p.features};
      // Rows past the end are read as zeros.
      const int64_t x_end[2] = {row < rows_end ? p.features : 0, row + 8 < rows_end ? p.features : 0};
      Words4 next[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) next[i] = load_run<T, kVector>(x[i], begin * kWindow + kRun * t, x_end[i]);
      for (int64_t window = begin; window < end; ++window) {
        const int64_t feature = window * kWindow + kRun * t;
        const Words4 words[2] = {next[0], next[1]};
#pragma unroll
        for (int i = 0; i < 2; ++i) next[i] = load_run<T, kVector>(x[i], feature + kWindow, x_end[i]);
        float values[2][kRun];
        int masked_for = -1;  // the tile that `values` were masked for
#pragma unroll
        for (int q = 0; q < kTiles; ++q) {
          if ((serving >> q & 1) == 0) continue;
          const ShrinkTile& tile = p.tile[first_tile + q];
          const FactorRun factor =
              load_factor(p, tile, factor_begin, g, feature);  // in flight while values are masked
          if (masked_for < 0 || !(kExperts || uses_same_activations(p.tile[masked_for], tile))) {
            masked_for = first_tile + q;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              unpack_run<T>(words[i], values[i]);
              if (!kTransposed && drops(tile)) {  // dY has none
                drop_run<kVector>(tile.mask, (row + 8 * i) * p.features + feature, values[i]);
              }
            }
          }
          add_window<T>(factor, tile.is_f32, values, sums[q]);
        }
      }
    }

    Shared* shared = shared_memory<Shared>();
#pragma unroll
    for (int q = 0; q < kTiles; ++q) {
      store(reinterpret_cast<Vec<float, 2>*>(&shared->sum[warp][g][8 * q + 2 * t]), {sums[q][0], sums[q][1]});
      store(reinterpret_cast<Vec<float, 2>*>(&shared->sum[warp][g + 8][8 * q + 2 * t]),
            {sums[q][2], sums[q][3]});
    }
    __syncthreads();
    write_sums(p, *shared, rows, rows_end, first_tile, slices, split);
    if (p.splits == 1) return;
    uint32_t* counter = p.counter + first_tile / kTiles * p.row_blocks + row_block;
    if (is_last_of_tile(counter, p.splits, &shared->last)) add_splits(p, rows, rows_end, first_tile);
  }

 private:
  // Experts have one adapter, without dropout or row groups.
  static DEVICE const int64_t* row_group(const Params& p) { return kExperts ? nullptr : p.row_group; }
  static DEVICE bool drops(const RankTile& tile) { return !kExperts && tile.mask.threshold != 0; }

  // Bit q: tile first + q serves some of the warp's rows.
  static DEVICE uint32_t serving_tiles(const Params& p, int first, int64_t row, int64_t rows_end) {
    const int64_t last_row = rows_end - 1;
    if (row - lane_index() / 4 > last_row) return 0;
    int64_t group[2] = {};
    if (row_group(p)) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int64_t at = row + 8 * i < last_row ? row + 8 * i : last_row;
        group[i] = load_constant(row_group(p) + at);
      }
    }
    uint32_t serving = 0;
    for (int q = 0; q < kTiles && first + q < p.tiles; ++q) {
      const int64_t own = p.tile[first + q].group;
      if (!row_group(p) || __ballot_sync(kAllLanes, group[0] == own || group[1] == own) != 0)
        serving |= 1u << q;
    }
    return serving;
  }

  static DEVICE FactorRun load_factor(const Params& p, const ShrinkTile& tile, int64_t first, int g,
                                      int64_t feature) {
    const int64_t end = g < tile.ranks ? p.features : 0;
    if constexpr (kTransposed) {
      return load_factor_column<T>(tile.factor, tile.is_f32, first + g, tile.ld, feature, end);
    } else {
      return load_factor_run<T, kVector>(tile.factor, tile.is_f32, first + g * tile.ld, feature, end);
    }
  }

  // Calls body(tile, row, rank, row and column in the block) for a thread's part of a block's sums.
  template <class Body>
  static DEVICE void for_each_sum(const Params& p, int64_t rows, int64_t rows_end, int first_tile,
                                  const Body& body) {
    for (int i = thread_index(); i < p.row_warps * kRows * 8 * kTiles; i += kThreads) {
      const int column = i % (8 * kTiles), in_block = i / (8 * kTiles), tile = first_tile + column / 8;
      if (rows + in_block >= rows_end || tile >= p.tiles || column % 8 >= p.tile[tile].ranks) continue;
      body(p.tile[tile], rows + in_block, column % 8, in_block, column);
    }
  }
  static DEVICE void write_sums(const Params& p, const Shared& shared, int64_t rows, int64_t rows_end,
                                int first_tile, int slices, int split) {
    float* out = p.splits == 1 ? p.out : p.partial + split * p.m * p.out_ld;
    for_each_sum(p, rows, rows_end, first_tile,
                 [&](const ShrinkTile& tile, int64_t row, int rank, int in_block, int column) {
                   float sum = 0.0f;
                   if (!row_group(p) || load_constant(row_group(p) + row) == tile.group) {
                     for (int slice = 0; slice < slices; ++slice) {
                       const int warp = slice * p.row_warps + in_block / kRows;
                       sum += load(&shared.sum[warp][in_block % kRows][column]);
                     }
                     sum *= tile.scale;
                   }
                   store(out + row * p.out_ld + tile.column + rank, sum);
                 });
  }
  static DEVICE void add_splits(const Params& p, int64_t rows, int64_t rows_end, int first_tile) {
    for_each_sum(p, rows, rows_end, first_tile, [&](const ShrinkTile& tile, int64_t row, int rank, int, int) {
      const int64_t at = row * p.out_ld + tile.column + rank;
      float sum = 0.0f;
      for (int split = 0; split < p.splits; ++split) sum += load(p.partial + split * p.m * p.out_ld + at);
      store(p.out + at, sum);
    });
  }
};

template <class T, bool kVector, bool kTransposed>
struct LoraShrink : LoraShrinkOf<T, kVector, kTransposed, false> {};
template <class T, bool kTransposed>
struct ExpertsShrink : LoraShrinkOf<T, true, kTransposed, true> {};

}  // namespace peft_kernels::cuda
