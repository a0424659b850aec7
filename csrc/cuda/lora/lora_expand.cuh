// From ranks to features: y = x W^T + s h B^T and dx = dY W + mask(dH A), where the deltas of adapters do not
// join the GEMM with W as a slab.
#pragma once

#include "../core/row_tiles.cuh"
#include "lora_fragments.cuh"

namespace peft_kernels::cuda {

// What an adapter adds: rows of `ranks` times a factor, plus a bias.
struct Delta {
  RankFactor factor;
  const float* bias;  // of features, or null
  DropoutMask mask;
  float scale;
  int64_t group;   // of the rows it is added to
  int64_t column;  // of its first rank, in `ranks`
  int rank;
};

// out[m, feature] = the sum of the terms + the sum over deltas of scale * (mask(ranks factor) + bias),
// rounded once. out may be one of the terms.
//
// A warp has 32 rows and 32 features. Lane (g, t) reads features 4g .. 4g + 3 of ranks t and t + 4. As the
// columns of a matrix product can be permuted, its sums are features 8t .. 8t + 7: two blocks of Philox and
// one memory access per row.
//
// kBottleneck: one term and one delta, which may have a bias; where the delta is 0, out equals the term to
// the bit.
// kExperts: blocks have tiles of rows from a list on the device, and each expert has its factor and its bias,
// which is not scaled. The rows of out may be longer than those of the terms.
template <class T, bool kVector, bool kBottleneck, bool kExperts = false>
struct LoraExpandOf {
  static constexpr int kThreads = 128;
  static constexpr int kBlocksPerSm = kVector && !kBottleneck ? 3 : 2;
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr int kRows = 32;      // of a block
  static constexpr int kFeatures = 32;  // of a warp
  static constexpr int kMaxTerms = 16;
  static constexpr int kMaxDeltas = 32;

  struct Params {
    T* out;
    int64_t m, features;
    const int64_t* row_group;  // or null: deltas are added to all rows
    const float* ranks;
    int64_t ld;  // of ranks
    int64_t feature_blocks;
    int terms, deltas;
    const T* term[kMaxTerms];
    Delta delta[kMaxDeltas];
    ExpertRows experts;
    int64_t factor_stride, bias_stride;  // from an expert's to the next's
    int64_t out_ld;
  };

  static DEVICE void run(const Params& p) {
    const int g = lane_index() / 4, t = lane_index() % 4;
    const int64_t row_block = block_index() / p.feature_blocks;
    const int64_t features =
        (block_index() % p.feature_blocks * kWarps + warp_index()) * kFeatures;  // the warp's first
    if (features >= p.features) return;
    if constexpr (kExperts) {
      if (row_block >= load_constant(p.experts.count)) return;
      const RowTile tile = load_row_tile(p.experts, static_cast<int>(row_block));
      for (int rows = tile.begin; rows < tile.end; rows += kRows) {
        expand(p, rows, tile, features, g, t);
      }
    } else {
      expand(p, row_block * kRows, {}, features, g, t);
    }
  }

 private:
  // `tile`: of experts.
  static DEVICE void expand(const Params& p, int64_t rows, const RowTile& tile, int64_t features, int g,
                            int t) {
    float total[kRows / 8][kRun];  // rows g, g + 8, ..; features 8t ..
#pragma unroll
    for (int i = 0; i < kRows / 8; ++i) {
#pragma unroll
      for (int j = 0; j < kRun; ++j)
        total[i][j] = kBottleneck ? -0.0f : 0.0f;  // adding a term to -0 does not change it
      if constexpr (kExperts) {
        const float* bias = p.delta[0].bias;
        add_bias<kVector>(bias ? bias + tile.expert * p.bias_stride : bias, features + kRun * t, p.features,
                          total[i]);
      }
    }
    for (int term = 0; term < p.terms; ++term) {
      Words4 words[kRows / 8];  // all loaded before the first is used
#pragma unroll
      for (int i = 0; i < kRows / 8; ++i) {
        const int64_t row = rows + g + 8 * i;
        words[i] = load_run<T, kVector, false>(p.term[term] + row * p.features, features + kRun * t,
                                               row < rows_end(p, tile) ? p.features : 0);
      }
#pragma unroll
      for (int i = 0; i < kRows / 8; ++i) {
        float values[kRun];
        unpack_run<T>(words[i], values);
#pragma unroll
        for (int j = 0; j < kRun; ++j) total[i][j] += values[j];
      }
    }
    for (int i = 0; i < (kExperts ? 1 : p.deltas); ++i) {
      add_delta(p, p.delta[i], rows, tile, features, g, t, total);
    }
#pragma unroll
    for (int i = 0; i < kRows / 8; ++i) {
      const int64_t row = rows + g + 8 * i;
      if (row < rows_end(p, tile)) {
        store_run<T, kVector>(p.out + row * (kExperts ? p.out_ld : p.features), features + kRun * t,
                              p.features, total[i]);
      }
    }
  }

  static DEVICE void add_delta(const Params& p, const Delta& delta, int64_t rows, const RowTile& tile,
                               int64_t features, int g, int t, float (&total)[kRows / 8][kRun]) {
    bool served[kRows / 8];
    bool any = false;
#pragma unroll
    for (int i = 0; i < kRows / 8; ++i) {
      const int64_t row = rows + g + 8 * i;
      served[i] =
          row < rows_end(p, tile) && (!row_group(p) || load_constant(row_group(p) + row) == delta.group);
      any = any || served[i];
    }
    if (__ballot_sync(kAllLanes, any) == 0) return;
    float sums[kRows / 16][4][4] = {};  // [16 rows][column mod 4]
    for (int rank = 0; rank < delta.rank; rank += 8) {
      float factor[2][4];  // ranks t, t + 4; features 4g ..
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int at = rank + t + 4 * i;
        const int64_t end = at < delta.rank ? p.features : 0;
        if constexpr (kExperts) {
          RankFactor own = delta.factor;
          own.data =
              static_cast<const char*>(own.data) + tile.expert * p.factor_stride * (own.is_f32 ? 4 : 2);
          load_four<T, kVector>(own, at, features + 4 * g, end, factor[i]);
        } else {
          load_four<T, kVector>(delta.factor, at, features + 4 * g, end, factor[i]);
        }
      }
      Tf32Pair ranks[kRows / 8][2];
#pragma unroll
      for (int i = 0; i < kRows / 8; ++i) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int at = rank + t + 4 * j;
          const float* from = p.ranks + (rows + g + 8 * i) * p.ld + delta.column + at;
          ranks[i][j] = split_tf32(served[i] && at < delta.rank ? load_constant(from) : 0.0f);
        }
      }
      add_ranks<kRows / 16>(ranks, factor, sums);
    }
#pragma unroll
    for (int i = 0; i < kRows / 8; ++i) {
      if (!served[i]) continue;
      float values[kRun];
#pragma unroll
      for (int j = 0; j < kRun; ++j) values[j] = sums[i / 2][j % 4][2 * (i % 2) + j / 4];
      if (!kExperts && delta.mask.threshold != 0) {
        const int64_t row = rows + g + 8 * i;
        drop_run<kVector>(delta.mask, row * p.features + features + kRun * t, values);
      }
      if constexpr (kBottleneck) add_bias<kVector>(delta.bias, features + kRun * t, p.features, values);
#pragma unroll
      for (int j = 0; j < kRun; ++j) {
        if constexpr (kBottleneck) {
          total[i][j] = add_scaled(total[i][j], delta.scale, values[j]);
        } else {
          total[i][j] += delta.scale * values[j];
        }
      }
    }
  }

  static DEVICE int64_t rows_end(const Params& p, const RowTile& tile) { return kExperts ? tile.end : p.m; }
  // Experts have one adapter, without dropout or row groups.
  static DEVICE const int64_t* row_group(const Params& p) { return kExperts ? nullptr : p.row_group; }
};

template <class T, bool kVector>
struct LoraExpand : LoraExpandOf<T, kVector, false> {};
template <class T, bool kVector>
struct BottleneckExpand : LoraExpandOf<T, kVector, true> {};
struct ExpertsExpand : LoraExpandOf<bf16, true, false, true> {};

}  // namespace peft_kernels::cuda
