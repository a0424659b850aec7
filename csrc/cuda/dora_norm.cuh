// The norms of the rows of W + s B A: ||w + s b A||^2 = w . w + s (2 w A^T + s b A A^T) . b.
#pragma once

#include "nf4_tables.cuh"

namespace peft_kernels::cuda {

// Of an NF4 weight, out[row, 0] = w . w and out[row, 1 + rank] = w . a, over the part of k that a split has;
// all in fp32.
//
// A warp has 4 rows and a block 8 times that, which share A, slice by slice of 256 k through shared memory.
// In a slice, lane i has elements 8i .. 8i + 7, a word of codes. Ranks that are more than kRanks have blocks
// of their own.
template <int kRanks>
struct SumRows {
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerSm = 2;
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr int kRows = 4;  // of a warp
  static constexpr int kRowsOfBlock = kWarps * kRows;
  static constexpr int kRun = 8;  // elements in a word of codes
  static constexpr int kSlice = kWarp * kRun;
  static constexpr int kHalf = kRun / 2;

  struct Params {
    Nf4View weight;
    const float* a;  // [ranks, k], 16-byte aligned
    int64_t n, k;    // k a multiple of kRun
    int ranks;
    int64_t row_blocks;
    int splits;
    float* out;  // [splits, n, 1 + ranks]
  };
  // A's. Halves of runs are apart, so that lanes read what lies side by side, and by so much that copies of
  // both go to different banks.
  using Slice = Vec<float, kHalf>[kRanks][2][kWarp + 4];
  struct Shared {
    Slice a[2];
    float code[nf4::kCodes];
    float map[nf4::kDynamicCodes];
  };

  static DEVICE void run(const Params& p) {
    Shared* shared = shared_memory<Shared>();
    const int thread = thread_index(), lane = lane_index();
    const int64_t row_block = block_index() % p.row_blocks;
    const int split = static_cast<int>(block_index() / p.row_blocks % p.splits);
    const int first_rank = static_cast<int>(block_index() / p.row_blocks / p.splits) * kRanks;
    const int64_t first_row = row_block * kRowsOfBlock + warp_index() * kRows;
    const int64_t slices = (p.k + kSlice - 1) / kSlice;
    const int64_t begin = slices * split / p.splits, end = slices * (split + 1) / p.splits;

    if (thread < nf4::kCodes) store(&shared->code[thread], kCodeTable.value[thread]);
    fill_map<kThreads>(p.weight, shared->map);
    const float offset = load_scale_offset(p.weight);

    float squares[kRows] = {}, products[kRows * kRanks] = {};
    copy_slice(p, shared->a[begin % 2], first_rank, begin);
    Run next[kRows];
    load_runs(p, first_row, begin, next);
    for (int64_t slice = begin; slice < end; ++slice) {
      copy_async_wait<0>();
      sync_threads();  // also: everybody is through with the other buffer
      if (slice + 1 < end) copy_slice(p, shared->a[(slice + 1) % 2], first_rank, slice + 1);
      uint32_t codes[kRows];
      float scale[kRows];
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
        codes[i] = next[i].codes;
        scale[i] = is_inside(p, slice) ? unpack_scale(next[i].scale, shared->map, offset) : 0.0f;
      }
      if (slice + 1 < end) load_runs(p, first_row, slice + 1, next);
      const Slice& a = shared->a[slice % 2];
      // Rolled, or it would want more registers than there are.
#pragma unroll 1
      for (int half = 0; half < 2; ++half) {
        float w[kRows][kHalf];
#pragma unroll
        for (int i = 0; i < kRows; ++i) {
#pragma unroll
          for (int j = 0; j < kHalf; ++j) {
            const int shift = half * 16 + j / 2 * 8 + (j % 2 ? 0 : 4);
            w[i][j] = multiply_rn(load(&shared->code[codes[i] >> shift & 15]), scale[i]);
            squares[i] = multiply_add(w[i][j], w[i][j], squares[i]);
          }
        }
#pragma unroll
        for (int rank = 0; rank < kRanks; ++rank) {
          const Vec<float, kHalf> factor = load(&a[rank][half][lane]);
#pragma unroll
          for (int i = 0; i < kRows; ++i) {
#pragma unroll
            for (int j = 0; j < kHalf; ++j) {
              float& sum = products[i * kRanks + rank];
              sum = multiply_add(w[i][j], factor.v[j], sum);
            }
          }
        }
      }
    }
    write(p, split, first_row, first_rank, squares, products);
  }

 private:
  // A word of codes of a row on its way from global memory.
  struct Run {
    uint32_t codes;
    PackedScale scale;
  };

  static DEVICE bool is_inside(const Params& p, int64_t slice) {
    return slice * kSlice + lane_index() * kRun < p.k;
  }

  // Outside of the weight, others of its elements.
  static DEVICE void load_runs(const Params& p, int64_t first_row, int64_t slice, Run (&runs)[kRows]) {
    const int64_t k = is_inside(p, slice) ? slice * kSlice + lane_index() * kRun : 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int64_t row = first_row + i < p.n ? first_row + i : p.n - 1, element = row * p.k + k;
      runs[i].codes = load_once(reinterpret_cast<const uint32_t*>(p.weight.packed + element / 2));
      runs[i].scale = load_scale(p.weight, static_cast<uint32_t>(element >> p.weight.block_shift));
    }
  }

  // Zeros for ranks and k that there are none of.
  static DEVICE void copy_slice(const Params& p, Slice& to, int first_rank, int64_t slice) {
    constexpr int kParts = kSlice / kHalf;  // of a rank
#pragma unroll
    for (int i = 0; i < kRanks * kParts / kThreads; ++i) {
      const int rank = (i * kThreads + thread_index()) / kParts, part = thread_index() % kParts;
      const int64_t k = slice * kSlice + part * kHalf;
      copy_async_16(&to[rank][part % 2][part / 2], p.a + (first_rank + rank) * p.k + k,
                    first_rank + rank < p.ranks && k < p.k);
    }
    copy_async_commit();
  }

  // Sums over lanes: each step adds half of them to those of the lane on the other side, until lane i has
  // kMine of them, from i * kMine on, at the start.
  template <int kMine, int kStep>
  static DEVICE void add_over_lanes(float (&sums)[kRows * kRanks]) {
    const bool upper = (lane_index() & kStep) != 0;
#pragma unroll
    for (int i = 0; i < kStep * kMine; ++i) {
      const float low = sums[i], high = sums[i + kStep * kMine];
      sums[i] = (upper ? high : low) + shuffle_xor(upper ? low : high, kStep);
    }
    if constexpr (kStep > 1) add_over_lanes<kMine, kStep / 2>(sums);
  }

  static DEVICE void write(const Params& p, int split, int64_t first_row, int first_rank,
                           float (&squares)[kRows], float (&products)[kRows * kRanks]) {
    const int lane = lane_index();
    const int64_t ld = 1 + p.ranks;
    float* out = p.out + split * p.n * ld;
    constexpr int kMine = kRows * kRanks / kWarp;
    add_over_lanes<kMine, kWarp / 2>(products);
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      const int64_t row = first_row + (lane * kMine + i) / kRanks;
      const int rank = first_rank + (lane * kMine + i) % kRanks;
      if (row < p.n && rank < p.ranks) store(out + row * ld + 1 + rank, products[i]);
    }
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
#pragma unroll
      for (int step = kWarp / 2; step > 0; step /= 2) squares[i] += shuffle_xor(squares[i], step);
      if (lane == 0 && first_rank == 0 && first_row + i < p.n) {
        store(out + (first_row + i) * ld, squares[i]);
      }
    }
  }
};

// A warp for each row.
struct FinishNorms {
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerSm = 4;
  static constexpr int kRowsOfBlock = kThreads / kWarp;
  using Params = DoraNorm;

  static DEVICE void run(const Params& p) {
    const int64_t row = int64_t{block_index()} * kRowsOfBlock + warp_index();
    if (row >= p.n) return;
    const float* b = p.b + row * p.ranks;
    float dot = 0.0f;
    for (int64_t rank = lane_index(); rank < p.ranks; rank += kWarp) {
      float product = 0.0f;
      for (int64_t i = 0; i < p.ranks; ++i) {
        product = multiply_add(load_constant(b + i), load_constant(p.gram + i * p.ranks + rank), product);
      }
      const float sum = sum_of_splits(p, p.products + row * p.products_ld + rank);
      dot = multiply_add(multiply_add(p.scaling, product, 2.0f * sum), load_constant(b + rank), dot);
    }
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) dot += shuffle_xor(dot, step);
    if (lane_index() != 0) return;
    const float square = multiply_add(p.scaling, dot, sum_of_splits(p, p.squares + row * p.squares_ld));
    // Rounding may have made it negative; a NaN stays one.
    store(p.norm + row, square < 0.0f ? 0.0f : sqrt_rn(square));
  }

 private:
  static DEVICE float sum_of_splits(const Params& p, const float* from) {
    float sum = 0.0f;
    for (int split = 0; split < p.splits; ++split) sum += load_constant(from + split * p.split_stride);
    return sum;
  }
};

}  // namespace peft_kernels::cuda
