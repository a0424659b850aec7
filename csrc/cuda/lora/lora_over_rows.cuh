// dA = dH^T mask(x) and dB = s dY^T h of several adapters: sums over the rows of a batch.
#pragma once

#include "../core/row_tiles.cuh"
#include "../core/sum_splits.cuh"
#include "lora_fragments.cuh"

namespace peft_kernels::cuda {

struct GradientTile : RankTile {
  void* out;      // gradient of the first rank's first feature
  int64_t begin;  // its offset in `partial`
  int64_t rank_stride, feature_stride;
  bool is_f32;  // else T
};

// out[rank * rank_stride + feature * feature_stride] = scale * the sum over rows of factors[m, column + rank]
// * mask(x)[m, feature]. Rows may be split over blocks; the last block to arrive adds the splits in order.
//
// Activations go from global memory to the tensor core unchanged: lane (g, t) holds features 8g .. 8g + 7 of
// rows t, t + 4, t + 8 and t + 12. Each word of such a run gives two rows of an operand, as features can be
// permuted. The warps of a block have different rows of the same 64 features.
//
// Neither activations nor factors of a row reach the sums of adapters that do not serve it, so these may
// share columns of the factors.
//
// kExperts: a sum for each expert over its rows, by separate blocks and without splits.
template <class T, bool kVector, bool kExperts>
struct LoraOverRowsOf {
  static constexpr int kThreads = 128;
  static constexpr int kBlocksPerSm = kVector ? 3 : 2;
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr int kFeatures = 64;  // of a block
  static constexpr int kTiles = 2;      // of a block
  static constexpr int kRows = 16;      // at a time, of a warp
  static constexpr int kMaxTiles = 44;

  struct Params {
    const T* x;
    int64_t m, features;
    const int64_t* row_group;  // or null: all rows are served
    const float* factors;
    int64_t ld;         // of factors
    float* partial;     // [splits, count]
    int64_t count;      // elements of all gradients
    uint32_t* counter;  // [blocks / splits] of a launch
    int64_t feature_blocks;
    int splits;
    int tiles;
    GradientTile tile[kMaxTiles];
    ExpertRows experts;
    int64_t out_stride;  // from an expert's gradient to the next's
  };
  struct Shared {
    float sum[kWarps][8 * kTiles][kFeatures + 2];
    uint32_t last;
  };

  static DEVICE void run(const Params& p) {
    const int warp = warp_index(), g = lane_index() / 4, t = lane_index() % 4;
    // Blocks with the same activations are neighbours.
    const int chunks = (p.tiles + kTiles - 1) / kTiles;
    const int first_tile = block_index() % chunks * kTiles;
    const int64_t first_feature = block_index() / chunks % p.feature_blocks * kFeatures;
    const int outer = static_cast<int>(block_index() / chunks / p.feature_blocks);
    const int split = kExperts ? 0 : outer;
    int64_t first_row = 0, rows_end = p.m, out_begin = 0;
    if constexpr (kExperts) {
      const Words2 range = load_constant(reinterpret_cast<const Words2*>(p.experts.ranges + outer));
      first_row = range.v[0];
      rows_end = range.v[1];
      out_begin = outer * p.out_stride;
    }
    const int64_t units = (rows_end - first_row + kRows - 1) / kRows;
    const int slices = splits(p) * kWarps, slice = split * kWarps + warp;
    const int64_t begin = first_row + units * slice / slices * kRows;
    const int64_t end = first_row + units * (slice + 1) / slices * kRows;

    constexpr int kBlocks = kRun / 2;  // of 16 features
    float sums[kTiles][kBlocks][4] = {};
    const int64_t feature = first_feature + kRun * g;
    Words4 next[4];
    load_rows(p, begin + t, rows_end, feature, next);
    for (int64_t row = begin; row < end; row += kRows) {
      const Words4 words[4] = {next[0], next[1], next[2], next[3]};
      load_rows(p, row + kRows + t, rows_end, feature, next);
      int64_t group[4] = {};
      if (row_group(p)) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int64_t at = row + t + 4 * i;
          group[i] = load_constant(row_group(p) + (at < p.m ? at : p.m - 1));
        }
      }
      float values[4][kRun];
      int masked_for = -1;  // the tile that `values` were masked for
#pragma unroll
      for (int q = 0; q < kTiles; ++q) {
        if (first_tile + q >= p.tiles) continue;
        const GradientTile& tile = p.tile[first_tile + q];
        if (row_group(p)) {
          const bool any = group[0] == tile.group || group[1] == tile.group || group[2] == tile.group ||
                           group[3] == tile.group;
          if (__ballot_sync(kAllLanes, any) == 0) continue;
        }
        if (masked_for < 0 || !(kExperts || uses_same_activations(p.tile[masked_for], tile))) {
          masked_for = first_tile + q;
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            unpack_run<T>(words[i], values[i]);
            if (drops(tile)) {
              drop_run<kVector>(tile.mask, (row + t + 4 * i) * p.features + feature, values[i]);
            }
            if (row_group(p) && group[i] != tile.group) {
#pragma unroll
              for (int j = 0; j < kRun; ++j) values[i][j] = 0.0f;
            }
          }
        }
        bool served[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          served[i] = row + t + 4 * i < rows_end && (!row_group(p) || group[i] == tile.group);
        }
        add_rows(p, tile, row + t, served, g, values, sums[q]);
      }
    }

    Shared* shared = shared_memory<Shared>();
#pragma unroll
    for (int q = 0; q < kTiles; ++q) {
#pragma unroll
      for (int j = 0; j < kBlocks; ++j) {
        const float (&sum)[4] = sums[q][j];  // features 8g + 2j and 8g + 2j + 1, ranks 2t and 2t + 1
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          store(reinterpret_cast<Vec<float, 2>*>(&shared->sum[warp][8 * q + 2 * t + i][kRun * g + 2 * j]),
                {sum[i], sum[i + 2]});
        }
      }
    }
    __syncthreads();
    write_sums(p, *shared, first_tile, first_feature, split, out_begin);
    if (splits(p) == 1) return;
    uint32_t* counter = p.counter + block_index() % (chunks * static_cast<int>(p.feature_blocks));
    if (is_last_of_tile(counter, p.splits, &shared->last)) add_splits(p, first_tile, first_feature);
  }

 private:
  // Experts have one adapter, without dropout, row groups or splits.
  static DEVICE const int64_t* row_group(const Params& p) { return kExperts ? nullptr : p.row_group; }
  static DEVICE int splits(const Params& p) { return kExperts ? 1 : p.splits; }
  static DEVICE bool drops(const RankTile& tile) { return !kExperts && tile.mask.threshold != 0; }

  static DEVICE void load_rows(const Params& p, int64_t row, int64_t rows_end, int64_t feature,
                               Words4 (&words)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int64_t at = row + 4 * i;
      words[i] = load_run<T, kVector>(p.x + at * p.features, feature, at < rows_end ? p.features : 0);
    }
  }

  // sums += 16 rows of factors, those that are `served`, times those of the activations, transposed.
  static DEVICE void add_rows(const Params& p, const GradientTile& tile, int64_t row, const bool (&served)[4],
                              int g, const float (&values)[4][kRun], float (&sums)[kRun / 2][4]) {
    Tf32Pair factor[4];  // of rows `row`, + 4, + 8, + 12
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float* from = p.factors + (row + 4 * i) * p.ld + tile.column + g;
      factor[i] = split_tf32(served[i] && g < tile.ranks ? load_constant(from) : 0.0f);
    }
#pragma unroll
    for (int j = 0; j < kRun / 2; ++j) {
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        // Two accumulations and no more: tensor cores truncate sums.
        float sum[4] = {};
        const float (&first)[kRun] = values[2 * step];
        const float (&second)[kRun] = values[2 * step + 1];
        const uint32_t a[4] = {bit_cast<uint32_t>(first[2 * j]), bit_cast<uint32_t>(first[2 * j + 1]),
                               bit_cast<uint32_t>(second[2 * j]), bit_cast<uint32_t>(second[2 * j + 1])};
        mma_tf32(sum, a, {factor[2 * step].low, factor[2 * step + 1].low});
        mma_tf32(sum, a, {factor[2 * step].high, factor[2 * step + 1].high});
#pragma unroll
        for (int i = 0; i < 4; ++i) sums[j][i] += sum[i];
      }
    }
  }

  // Calls body(tile, element of the gradient, column and feature in the block) for a thread's part of a
  // block's sums.
  template <class Body>
  static DEVICE void for_each_sum(const Params& p, int first_tile, int64_t first_feature, const Body& body) {
    // Consecutive elements go to consecutive threads.
    const bool ranks_first = p.tile[first_tile].rank_stride == 1;
    for (int i = thread_index(); i < 8 * kTiles * kFeatures; i += kThreads) {
      const int column = ranks_first ? i % (8 * kTiles) : i / kFeatures;
      const int in_block = ranks_first ? i / (8 * kTiles) : i % kFeatures;
      const int64_t feature = first_feature + in_block;
      const int tile_index = first_tile + column / 8, rank = column % 8;
      if (tile_index >= p.tiles || feature >= p.features) continue;
      const GradientTile& tile = p.tile[tile_index];
      if (rank >= tile.ranks) continue;
      body(tile, rank * tile.rank_stride + feature * tile.feature_stride, column, in_block);
    }
  }
  static DEVICE void write_sums(const Params& p, const Shared& shared, int first_tile, int64_t first_feature,
                                int split, int64_t out_begin) {
    float* partial = p.partial + split * p.count;
    for_each_sum(p, first_tile, first_feature,
                 [&](const GradientTile& tile, int64_t element, int column, int in_block) {
                   float sum = 0.0f;
#pragma unroll
                   for (int warp = 0; warp < kWarps; ++warp) sum += load(&shared.sum[warp][column][in_block]);
                   sum *= tile.scale;
                   if (splits(p) > 1) {
                     store(partial + tile.begin + element, sum);
                   } else {
                     write(tile, out_begin + element, sum);
                   }
                 });
  }
  static DEVICE void add_splits(const Params& p, int first_tile, int64_t first_feature) {
    for_each_sum(p, first_tile, first_feature, [&](const GradientTile& tile, int64_t element, int, int) {
      float sum = 0.0f;
      for (int split = 0; split < p.splits; ++split) {
        sum += load(p.partial + split * p.count + tile.begin + element);
      }
      write(tile, element, sum);
    });
  }
  static DEVICE void write(const GradientTile& tile, int64_t element, float sum) {
    if (tile.is_f32) {
      store(static_cast<float*>(tile.out) + element, sum);
    } else {
      store(static_cast<T*>(tile.out) + element, from_float<T>(sum));
    }
  }
};

template <class T, bool kVector>
struct LoraOverRows : LoraOverRowsOf<T, kVector, false> {};
template <class T>
struct ExpertsOverRows : LoraOverRowsOf<T, true, true> {};

}  // namespace peft_kernels::cuda
