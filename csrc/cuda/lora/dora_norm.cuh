// The norms of the rows of W + s B A: ||w + s b A||^2 = w . w + s (2 w A^T + s b A A^T) . b.
#pragma once

#include "../nf4/nf4_tables.cuh"
#include "dora.h"
#include "lora_fragments.cuh"

namespace peft_kernels::cuda {

// For an NF4 weight: out[row, 0] = w . w and out[row, 1 + rank] = w . a, over the split's part of k.
//
// Computed on tensor cores from tf32 values, which have 11 bits; codes and A are split into these bits and
// the remainder, and all products but remainder times remainder are summed. Codes are multiplied unscaled,
// and the sums of a group of 64 are multiplied by its scale in fp32: this limits the length of sums on tensor
// cores, whose rounding is unspecified.
//
// A block has 64 rows and all of A that its split needs, slice by slice through shared memory. Four of its
// warps share the rows, two the groups of a slice. In a group, lane (g, t) of a warp has codes 16t .. 16t +
// 15 of rows g and g + 8 of each tile, and multiplies two per step. Ranks that do not fit into a block get
// more blocks.
template <int kRankTiles>
struct SumRows {
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerSm = 2;
  static constexpr int kRowWarps = 4, kDepthWarps = kThreads / kWarp / kRowWarps;
  static constexpr int kRowTiles = 1;  // of a warp
  static constexpr int kRowsOfWarp = 16 * kRowTiles, kRowsOfBlock = kRowsOfWarp * kRowWarps;
  static constexpr int kRanks = 8 * kRankTiles;
  static constexpr int kGroupShift = 6,
                       kGroup = 1 << kGroupShift;  // minimum number of elements that share a scale
  static constexpr int kSlice = kDepthWarps * kGroup;
  // Elements of A per copy: what a lane multiplies in two steps.
  static constexpr int kPart = 4;

  struct Params {
    Nf4View weight;
    const float* a;  // [ranks, k], 16-byte aligned
    int64_t n, k;    // k a multiple of kGroup
    int ranks;
    int64_t row_blocks;
    int splits;
    float* out;  // [splits, n, 1 + ranks]
  };
  // The value of a code, of which tf32 uses the upper bits, and the remainder.
  using Code = Vec<float, 2>;
  // Groups of A, with parts 0 to 3 of all quarters before the next. The pad puts two ranks that are read
  // together into different banks.
  using Slice = float[kRanks][kSlice + 16];
  using SumsOfWarp = float[kRowsOfBlock][kRanks + 1];
  using Sums = SumsOfWarp[kDepthWarps];
  struct Shared {
    union alignas(16) {
      Slice a[2];
      Sums sums;
    };
    Code code[nf4::kCodes];
    float map[nf4::kDynamicCodes];
  };

  static DEVICE void run(const Params& p) {
    Shared* shared = shared_memory<Shared>();
    const int thread = thread_index(), warp = warp_index();
    const int64_t first_row = block_index() % p.row_blocks * kRowsOfBlock;
    const int split = static_cast<int>(block_index() / p.row_blocks % p.splits);
    const int first_rank = static_cast<int>(block_index() / p.row_blocks / p.splits) * kRanks;
    const int row_warp = warp % kRowWarps, depth_warp = warp / kRowWarps;
    const int64_t slices = (p.k + kSlice - 1) / kSlice;
    const int64_t begin = slices * split / p.splits, end = slices * (split + 1) / p.splits;

    if (thread < nf4::kCodes) store(&shared->code[thread], split_code(code_value(p.weight, thread)));
    fill_map<kThreads>(p.weight, shared->map);
    const float offset = load_scale_offset(p.weight);

    Totals totals;
    const int64_t row = first_row + row_warp * kRowsOfWarp;
    copy_slice(p, shared->a[begin % 2], first_rank, begin);
    Codes next;
    load_codes(p, row, begin, depth_warp, next);
    for (int64_t slice = begin; slice < end; ++slice) {
      copy_async_wait<0>();
      __syncthreads();  // also: all threads are done with the other buffer
      if (slice + 1 < end) copy_slice(p, shared->a[(slice + 1) % 2], first_rank, slice + 1);
      Codes codes;
      PackedScale scales[kRowTiles][2];  // used after all multiplications
#pragma unroll
      for (int i = 0; i < 2 * kRowTiles; ++i) {
        codes[i / 2][i % 2] = next[i / 2][i % 2];
        const uint32_t at = group_at(p, row + i * 8 + lane_index() / 4, slice, depth_warp);
        scales[i / 2][i % 2] = load_scale(p.weight, at >> (p.weight.block_shift - kGroupShift));
      }
      if (slice + 1 < end) load_codes(p, row, slice + 1, depth_warp, next);
      if (slice * kSlice + depth_warp * kGroup >= p.k) continue;
      add_group(*shared, codes, scales, shared->a[slice % 2], depth_warp, offset, totals);
    }
    __syncthreads();  // all threads are done with A
    keep(totals, shared->sums[depth_warp], row_warp * kRowsOfWarp);
    __syncthreads();
    write(p, split, first_row, first_rank, shared->sums);
  }

 private:
  // A lane's codes of a group, in its rows.
  using Codes = Words2[kRowTiles][2];
  // Sums of a warp's rows in the layout of the matrix instruction; squares are partial sums of a lane.
  struct Totals {
    float products[kRowTiles][kRankTiles][4] = {};
    float squares[kRowTiles][2] = {};
  };

  static DEVICE float upper_bits(float x) { return bit_cast<float>(bit_cast<uint32_t>(x) & 0xffffe000u); }
  static DEVICE Code split_code(float x) {
    const float rest = x - upper_bits(x);
    return {{x, upper_bits(bit_cast<float>(bit_cast<uint32_t>(rest) + 0x1000u))}};
  }

  // The index of a row's group in the weight; an existing one for rows and groups past the end.
  static DEVICE uint32_t group_at(const Params& p, int64_t row, int64_t slice, int depth_warp) {
    const int64_t groups = p.k / kGroup, group = slice * kDepthWarps + depth_warp;
    return static_cast<uint32_t>((row < p.n ? row : p.n - 1) * groups + (group < groups ? group : 0));
  }

  static DEVICE void load_codes(const Params& p, int64_t first_row, int64_t slice, int depth_warp,
                                Codes& codes) {
    const int g = lane_index() / 4, t = lane_index() % 4;
    const auto* packed = reinterpret_cast<const Words2*>(p.weight.packed) + t;
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) {
      const uint32_t at = group_at(p, first_row + i * 8 + g, slice, depth_warp);
      codes[i / 2][i % 2] = load_once(packed + int64_t{at} * (kGroup / 16));
    }
  }

  // Ranks and k past the end are zeros.
  static DEVICE void copy_slice(const Params& p, Slice& to, int first_rank, int64_t slice) {
    constexpr int kParts = kSlice / kPart, kPartsOfGroup = kGroup / kPart;
#pragma unroll
    for (int i = 0; i < kRanks * kParts / kThreads; ++i) {
      const int rank = (i * kThreads + thread_index()) / kParts, part = thread_index() % kParts;
      const int64_t k = slice * kSlice + part * kPart;
      const int group = part / kPartsOfGroup, t = part / 4 % 4, pair = part % 4;
      copy_async_16(&to[rank][(group * kPartsOfGroup + pair * 4 + t) * kPart],
                    p.a + (first_rank + rank) * p.k + k, first_rank + rank < p.ranks && k < p.k);
    }
    copy_async_commit();
  }

  static DEVICE void add_group(const Shared& shared, Codes& codes, const PackedScale (&scales)[kRowTiles][2],
                               const Slice& a, int depth_warp, float offset, Totals& totals) {
    const int g = lane_index() / 4, t = lane_index() % 4;
    // Products of tf32 values, and products with a remainder.
    float large[kRowTiles][kRankTiles][4] = {}, small[kRowTiles][kRankTiles][4] = {};
    float squares[kRowTiles][2] = {};
    // Not unrolled: registers would not suffice.
#pragma unroll 1
    for (int pair = 0; pair < kGroup / 16; ++pair) {
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        uint32_t factor[kRankTiles][2], factor_rest[kRankTiles][2];
#pragma unroll
        for (int rank = 0; rank < kRankTiles; ++rank) {
          const float* of = a[rank * 8 + g] + depth_warp * kGroup + pair * 16 + t * kPart + step * 2;
          const Vec<float, 2> values = load(reinterpret_cast<const Vec<float, 2>*>(of));
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            factor[rank][i] = bit_cast<uint32_t>(values.v[i]);
            factor_rest[rank][i] = bit_cast<uint32_t>(raised_for_tf32(values.v[i] - upper_bits(values.v[i])));
          }
        }
#pragma unroll
        for (int tile = 0; tile < kRowTiles; ++tile) {
          uint32_t w[4], w_rest[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            // Rows g and g + 8 of the first code, then of the second; the first is in the upper nibble.
            const uint32_t word = codes[tile][i % 2].v[0];
            const Code code = load(&shared.code[word >> (step * 8 + (i < 2 ? 4 : 0)) & 15]);
            w[i] = bit_cast<uint32_t>(code.v[0]);
            w_rest[i] = bit_cast<uint32_t>(code.v[1]);
            squares[tile][i % 2] = __fmaf_rn(code.v[0], code.v[0], squares[tile][i % 2]);
          }
#pragma unroll
          for (int rank = 0; rank < kRankTiles; ++rank) {
            mma_tf32(large[tile][rank], w, factor[rank]);
            mma_tf32(small[tile][rank], w_rest, factor[rank]);
            mma_tf32(small[tile][rank], w, factor_rest[rank]);
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 2 * kRowTiles; ++i) {
        Words2& words = codes[i / 2][i % 2];
        words = {{words.v[0] >> 16 | words.v[1] << 16, words.v[1] >> 16}};
      }
    }
#pragma unroll
    for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float scale = unpack_scale(scales[tile][half], shared.map, offset);
        float& square = totals.squares[tile][half];
        square = __fmaf_rn(scale * scale, squares[tile][half], square);
#pragma unroll
        for (int rank = 0; rank < kRankTiles; ++rank) {
#pragma unroll
          for (int i = 2 * half; i < 2 * half + 2; ++i) {
            float& total = totals.products[tile][rank][i];
            total = __fmaf_rn(scale, large[tile][rank][i] + small[tile][rank][i], total);
          }
        }
      }
    }
  }

  // Stores the warp's sums, from first_row on.
  static DEVICE void keep(const Totals& totals, SumsOfWarp& sums, int first_row) {
    const int g = lane_index() / 4, t = lane_index() % 4;
#pragma unroll
    for (int i = 0; i < 2 * kRowTiles; ++i) {
      float* row = sums[first_row + i * 8 + g];
      float square = totals.squares[i / 2][i % 2];
      square += __shfl_xor_sync(kAllLanes, square, 1);
      square += __shfl_xor_sync(kAllLanes, square, 2);
      if (t == 0) store(row, square);
#pragma unroll
      for (int rank = 0; rank < kRankTiles; ++rank) {
#pragma unroll
        for (int j = 0; j < 2; ++j)
          store(row + 1 + rank * 8 + 2 * t + j, totals.products[i / 2][rank][i % 2 * 2 + j]);
      }
    }
  }

  static DEVICE void write(const Params& p, int split, int64_t first_row, int first_rank, const Sums& sums) {
    const int64_t ld = 1 + p.ranks;
    float* out = p.out + split * p.n * ld;
    // Not unrolled: few iterations, not worth the code.
#pragma unroll 1
    for (int i = thread_index(); i < kRowsOfBlock * (kRanks + 1); i += kThreads) {
      const int row = i / (kRanks + 1), column = i % (kRanks + 1);
      if (first_row + row >= p.n || first_rank + column > p.ranks || (column == 0 && first_rank > 0))
        continue;
      float sum = 0.0f;
#pragma unroll
      for (int depth_warp = 0; depth_warp < kDepthWarps; ++depth_warp) {
        sum += load(&sums[depth_warp][row][column]);
      }
      store(out + (first_row + row) * ld + (column == 0 ? 0 : first_rank + column), sum);
    }
  }
};

// A warp per row.
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
        product = __fmaf_rn(load_constant(b + i), load_constant(p.gram + i * p.ranks + rank), product);
      }
      const float sum = sum_of_splits(p, p.products + row * p.products_ld + rank);
      dot = __fmaf_rn(__fmaf_rn(p.scaling, product, 2.0f * sum), load_constant(b + rank), dot);
    }
#pragma unroll
    for (int step = kWarp / 2; step > 0; step /= 2) dot += __shfl_xor_sync(kAllLanes, dot, step);
    if (lane_index() != 0) return;
    const float square = __fmaf_rn(p.scaling, dot, sum_of_splits(p, p.squares + row * p.squares_ld));
    // Rounding may have made it negative; a NaN stays one.
    store(p.norm + row, square < 0.0f ? 0.0f : __fsqrt_rn(square));
  }

 private:
  static DEVICE float sum_of_splits(const Params& p, const float* from) {
    float sum = 0.0f;
    for (int split = 0; split < p.splits; ++split) sum += load_constant(from + split * p.split_stride);
    return sum;
  }
};

}  // namespace peft_kernels::cuda
