// Bottleneck adapters: up(drop(activation(down(x)))) + residual, and its backward without the gradients of
// parameters, both GEMMs in one kernel.
#pragma once

#include "../core/row_tiles.cuh"
#include "../lora/lora_fragments.cuh"
#include "bottleneck_between.cuh"

namespace peft_kernels::cuda {

// An adapter in one direction.
struct BottleneckAdapter {
  const void* in_factor;  // down [rank, in_features]; backward: up [in_features, rank]
  RankFactor out_factor;
  const float* bias;  // [out_features] or null
  BottleneckStep step;
  float in_scale, out_scale;  // of the sums
  int groups;  // number of groups of ranks, each for other warps; the remaining warps have other features
  int tiles;   // of a group
  int ld;      // of the intermediate: 4 modulo 8, so that lanes (g, t) use all banks
  bool in_is_f32;
};

// in [m, in_features] -> intermediate [m, rank] -> out [m, out_features]: x via z to y, or dy via dz to dx. A
// block has 32 rows. In the first half a warp sums 16 of them for up to 64 ranks, over its part of the
// features; in the second it computes all 32 rows for 32 features at a time. The intermediate goes through
// shared memory once.
//
// kGroups: each adapter has its own rows, in any order. A block takes a tile of them from a list, and the
// matrices between the GEMMs are as wide as the widest adapter. A group without an adapter has rank 0.
template <class T, bool kVector, bool kBackward, bool kGroups>
struct BottleneckRowsOf {
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerSm = kVector ? 2 : 1;
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr int kRows = 32;  // of a block
  static constexpr int kRowWarps = kRows / 16;
  static constexpr int kTiles = 8;      // of 8 ranks, of a warp
  static constexpr int kFeatures = 32;  // of a warp, at a time
  static constexpr int kMostRanks = kWarps / kRowWarps * kTiles * kTileRanks;
  static constexpr int kMaxAdapters = kGroups ? 32 : 1;

  struct Params {
    const T* in;
    int64_t m, in_features, out_features;
    BottleneckMatrices matrices;
    int64_t matrices_ld;
    const T* term;      // [m, out_features] or null: added
    T* out;             // or null: not needed
    ExpertRows listed;  // of kGroups: positions in `order`
    const int* order;
    int first;  // group of the first adapter; blocks of others do nothing
    int adapters;
    BottleneckAdapter adapter[kMaxAdapters];
  };

  static DEVICE void run(const Params& p) {
    if constexpr (kGroups) {
      const int index = block_index();
      if (index >= load_constant(p.listed.count)) return;
      const RowTile tile = load_row_tile(p.listed, index);
      const int i = tile.expert - p.first;
      if (i < 0 || i >= p.adapters) return;
      const Words2 range = load_constant(reinterpret_cast<const Words2*>(p.listed.ranges + tile.expert));
      run(p, p.adapter[i], {tile.begin, tile.end, static_cast<int>(range.v[0])});
    } else {
      run(p, p.adapter[0], {int64_t{block_index()} * kRows, p.m, 0});
    }
  }

 private:
  using Row = std::conditional_t<kGroups, int, int64_t>;

  // Positions of rows of one adapter: the row itself, or in `order`.
  struct Tile {
    Row begin, end;  // the tile's, which may be longer than kRows
    Row first;       // of the adapter
  };

  // The row at a position; -1: after the last one.
  static DEVICE Row row_at(const Params& p, const Tile& tile, Row position) {
    if (position >= tile.end) return -1;
    if constexpr (kGroups) return load_constant(p.order + position);
    return position;
  }

  static DEVICE void run(const Params& p, const BottleneckAdapter& a, const Tile& tile) {
    const int warp = warp_index(), g = lane_index() / 4, t = lane_index() % 4;
    const int row = warp % kRowWarps * 16 + g;
    const int rank = warp / kRowWarps % a.groups * a.tiles * kTileRanks;  // first rank of the warp
    const int slice = warp / kRowWarps / a.groups;
    float* between = shared_memory<float>();  // [slice][kRows][ld]
    {
      float sums[kTiles][4] = {};
      const bool has_rows = tile.begin + row - g < tile.end;
      if (has_rows && rank < a.step.rank) add_features(p, a, tile, row, rank, slice, g, t, sums);
#pragma unroll
      for (int q = 0; q < kTiles; ++q) {
        if (q >= a.tiles) continue;
        float* to = between + (slice * kRows + row) * a.ld + rank + kTileRanks * q + 2 * t;
        store(reinterpret_cast<Vec<float, 2>*>(to), {sums[q][0], sums[q][1]});
        store(reinterpret_cast<Vec<float, 2>*>(to + 8 * a.ld), {sums[q][2], sums[q][3]});
      }
    }
    __syncthreads();
    add_slices(p, a, tile, between);
    if (!p.out) return;
    __syncthreads();
    for (int64_t feature = warp * kFeatures; feature < p.out_features; feature += kWarps * kFeatures) {
      write_features(p, a, tile, feature, g, t, between);
    }
  }

  static DEVICE int slices(const BottleneckAdapter& a) { return kWarps / kRowWarps / a.groups; }

  static DEVICE void add_features(const Params& p, const BottleneckAdapter& a, const Tile& tile, int row,
                                  int rank, int slice, int g, int t, float (&sums)[kTiles][4]) {
    const int64_t windows = (p.in_features + kWindow - 1) / kWindow;
    const int64_t begin = windows * slice / slices(a), end = windows * (slice + 1) / slices(a);
    const T* in[2];
    int64_t in_end[2];  // rows after the last one are read as zeros
    Words4 next[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t from = row_at(p, tile, tile.begin + row + 8 * i);
      in[i] = p.in + from * p.in_features;
      in_end[i] = from < 0 ? 0 : p.in_features;
      next[i] = load_run<T, kVector>(in[i], begin * kWindow + kRun * t, in_end[i]);
    }
    for (int64_t window = begin; window < end; ++window) {
      const int64_t feature = window * kWindow + kRun * t;
      float values[2][kRun];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        unpack_run<T>(next[i], values[i]);
        next[i] = load_run<T, kVector>(in[i], feature + kWindow, in_end[i]);
      }
#pragma unroll
      for (int q = 0; q < kTiles; ++q) {
        const int first = rank + kTileRanks * q;
        if (q >= a.tiles || first >= a.step.rank) continue;
        const FactorRun factor = load_in_factor(p, a, first + g, feature);
        add_window<T>(factor, a.in_is_f32, values, sums[q]);
      }
    }
  }

  static DEVICE FactorRun load_in_factor(const Params& p, const BottleneckAdapter& a, int rank,
                                         int64_t feature) {
    const int64_t end = rank < a.step.rank ? p.in_features : 0;
    if constexpr (kBackward) {
      return load_factor_column<T>(a.in_factor, a.in_is_f32, rank, a.step.rank, feature, end);
    } else {
      return load_factor_run<T, kVector>(a.in_factor, a.in_is_f32, rank * p.in_features, feature, end);
    }
  }

  // Adds the slices and leaves the input of the second GEMM in the first slice.
  static DEVICE void add_slices(const Params& p, const BottleneckAdapter& a, const Tile& tile,
                                float* between) {
    const int rank = a.step.rank;
    const int64_t first = int64_t{tile.begin - tile.first} * rank;
    const int64_t count = int64_t{tile.end - tile.first} * rank;
    for (int at = 4 * thread_index(); at < kRows * rank; at += 4 * kThreads) {
      if (first + at >= count) return;
      int row = at / rank, column = at % rank;
      FourRanks four = flat_ranks(p.matrices, first + at, column, count);
      if constexpr (kGroups) four.is_vector = p.matrices.vectors && rank % 4 == 0;
      int place[4];
      Floats4 sums{};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (kGroups && four.at[i] >= 0) {
          four.at[i] = row_at(p, tile, tile.begin + row) * p.matrices_ld + column;
        }
        place[i] = row * a.ld + column;
        for (int slice = 0; slice < slices(a); ++slice) {
          sums.v[i] += load(between + slice * kRows * a.ld + place[i]);
        }
        sums.v[i] *= a.in_scale;
        if (++column == rank) ++row, column = 0;
      }
      const Floats4 found = between_gemms<kBackward>(a.step, p.matrices, four, sums);
#pragma unroll
      for (int i = 0; i < 4; ++i) store(between + place[i], found.v[i]);
    }
  }

  static DEVICE void write_features(const Params& p, const BottleneckAdapter& a, const Tile& tile,
                                    int64_t features, int g, int t, const float* between) {
    constexpr int kRuns = kRows / 8;
    const int64_t feature = features + kRun * t;
    Row row[kRuns];
    Words4 terms[kRuns];  // in flight while ranks are summed
#pragma unroll
    for (int i = 0; i < kRuns; ++i) {
      row[i] = row_at(p, tile, tile.begin + g + 8 * i);
      terms[i] = load_run<T, kVector>(p.term + row[i] * p.out_features, feature,
                                      p.term && row[i] >= 0 ? p.out_features : 0);
    }
    float sums[kRows / 16][4][4] = {};
    for (int rank = 0; rank < a.step.rank; rank += kTileRanks) {
      float factor[2][4];  // ranks t, t + 4
      Tf32Pair ranks[kRuns][2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int at = rank + t + 4 * j;
        const bool exists = at < a.step.rank;
        load_four<T, kVector>(a.out_factor, at, features + 4 * g, exists ? p.out_features : 0, factor[j]);
#pragma unroll
        for (int i = 0; i < kRuns; ++i) {
          ranks[i][j] = split_tf32(exists ? load(between + (g + 8 * i) * a.ld + at) : 0.0f);
        }
      }
      add_ranks<kRows / 16>(ranks, factor, sums);
    }
#pragma unroll
    for (int i = 0; i < kRuns; ++i) {
      if (row[i] < 0) continue;
      float values[kRun], total[kRun];
#pragma unroll
      for (int j = 0; j < kRun; ++j) values[j] = sums[i / 2][j % 4][2 * (i % 2) + j / 4];
      add_bias<kVector>(a.bias, feature, p.out_features, values);
      unpack_run<T>(terms[i], total);
#pragma unroll
      for (int j = 0; j < kRun; ++j) total[j] = add_scaled(total[j], a.out_scale, values[j]);
      store_run<T, kVector>(p.out + row[i] * p.out_features, feature, p.out_features, total);
    }
  }
};

template <class T, bool kVector, bool kBackward>
struct BottleneckRows : BottleneckRowsOf<T, kVector, kBackward, false> {};
template <class T, bool kVector, bool kBackward>
struct BottleneckGroups : BottleneckRowsOf<T, kVector, kBackward, true> {};

}  // namespace peft_kernels::cuda
