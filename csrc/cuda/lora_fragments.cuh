// What the kernels of adapters share: activations and fp32 factors as operands of the tensor core.
//
// Activations are exact as tf32. An fp32 factor is the sum of two tf32 numbers, which leaves half a unit of
// its last bit out: products are as good as those of fp32, with its range. A tensor core cuts sums off where
// fp32 rounds, so its sums are kept short and added up in fp32.
#pragma once

#include "device.cuh"
#include "dropout.cuh"
#include "kernels.h"
#include "launch.cuh"

namespace peft_kernels::cuda {

// x, whose lower 13 bits mma_tf32 will cut off, raised by half a unit of the upper ones (0.34 to 0.69 of
// one), so that what is lost has no sign. By a product, as NaN stays NaN so.
DEVICE float raised_for_tf32(float x) { return __fmaf_rn(x, 0x1.6p-12f, x); }

struct Tf32Pair {
  uint32_t high, low;
};

// The lower 13 bits of `low` count for nothing.
DEVICE Tf32Pair split_tf32(float value) {
  const uint32_t high = (bit_cast<uint32_t>(value) + 0x1000u) & 0xffffe000u;
  return {high, bit_cast<uint32_t>(raised_for_tf32(__fadd_rn(value, -bit_cast<float>(high))))};
}

// ---- Eight neighbours in a row ---------------------------------------------------------------------------

inline constexpr int kRun = 8;

// Elements [begin, begin + 8) of a row, 0 from `end` on; two in a word. kVector: rows are aligned to 16
// bytes, begin and end are multiples of 8. kConstant: nobody writes them while the kernel runs.
template <class T, bool kVector, bool kConstant = true>
DEVICE Words4 load_run(const T* row, int64_t begin, int64_t end) {
  Words4 words{};
  const auto read = [](const auto* p) { return kConstant ? load_constant(p) : load(p); };
  if constexpr (kVector) {
    if (begin < end) words = read(reinterpret_cast<const Words4*>(row + begin));
  } else {
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      if (begin + i < end) {
        const uint32_t bits = read(row + begin + i).bits;
        words.v[i / 2] |= i % 2 ? bits << 16 : bits;
      }
    }
  }
  return words;
}

template <class T>
DEVICE void unpack_run(const Words4& words, float (&values)[kRun]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    values[2 * i] = low_half<T>(words.v[i]);
    values[2 * i + 1] = high_half<T>(words.v[i]);
  }
}

// The same of an adapter's factor, which is fp32 or of type T, as it comes from memory: words of a float
// each, or two of T.
struct FactorRun {
  Words4 words[2];
};
template <class T, bool kVector>
DEVICE FactorRun load_factor_run(const void* factor, bool is_f32, int64_t row, int64_t begin, int64_t end) {
  FactorRun run{};
  if (!is_f32) {
    run.words[0] = load_run<T, kVector>(static_cast<const T*>(factor) + row, begin, end);
    return run;
  }
  const auto* from = static_cast<const uint32_t*>(factor) + row;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    if constexpr (kVector) {
      if (begin < end) run.words[half] = load_constant(reinterpret_cast<const Words4*>(from + begin) + half);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int64_t at = begin + 4 * half + i;
        if (at < end) run.words[half].v[i] = load_constant(from + at);
      }
    }
  }
  return run;
}
// The same of neighbours in a column, `stride` elements apart.
template <class T>
DEVICE FactorRun load_factor_column(const void* factor, bool is_f32, int64_t column, int64_t stride,
                                    int64_t begin, int64_t end) {
  FactorRun run{};
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    if (begin + i >= end) continue;
    const int64_t at = (begin + i) * stride + column;
    if (is_f32) {
      run.words[i / 4].v[i % 4] = load_constant(static_cast<const uint32_t*>(factor) + at);
    } else {
      const uint32_t bits = load_constant(static_cast<const T*>(factor) + at).bits;
      run.words[0].v[i / 2] |= i % 2 ? bits << 16 : bits;
    }
  }
  return run;
}
template <class T>
DEVICE void unpack_factor(const FactorRun& run, bool is_f32, float (&values)[kRun]) {
  if (!is_f32) return unpack_run<T>(run.words[0], values);
#pragma unroll
  for (int i = 0; i < kRun; ++i) values[i] = bit_cast<float>(run.words[i / 4].v[i % 4]);
}

// ---- Dropout ---------------------------------------------------------------------------------------------

// Sets to 0 what the mask drops of the elements [first, first + 8) of activations. kVector: first is a
// multiple of 4.
template <bool kVector>
DEVICE void drop_run(const DropoutMask& mask, int64_t first, float (&values)[kRun]) {
  const auto seed = static_cast<uint64_t>(load_constant(mask.seed));
  const int skipped = kVector ? 0 : static_cast<int>(first & 3);
#pragma unroll
  for (int block = 0; block < (kVector ? 2 : 3); ++block) {
    const Words4 words = philox((first >> 2) + block, seed, mask.stream);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const bool dropped = words.v[j] < mask.threshold;
      if constexpr (kVector) {
        if (dropped) values[4 * block + j] = 0.0f;
      } else {
        // No index that depends on `skipped`: it would put the values into memory.
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          if (dropped && i + skipped == 4 * block + j) values[i] = 0.0f;
        }
      }
    }
  }
}

// ---- Tiles of ranks --------------------------------------------------------------------------------------

inline constexpr int kTileRanks = 8;  // at most: a tile of the tensor core

// Ranks of one adapter side by side, and how activations and sums go with them.
struct RankTile {
  int64_t group;
  DropoutMask mask;  // of the activations
  float scale;       // of the sums
  int column;        // of the first rank, in h or dh
  int ranks;
};

// From `rank` on, for sums with x or with dY, which has no mask.
inline RankTile rank_tile(const AdapterView& adapter, int rank, bool of_dy) {
  return {adapter.group, of_dy ? DropoutMask{} : adapter.mask, of_dy ? adapter.scaling : adapter.mask.scale,
          static_cast<int>(adapter.h_begin + rank), std::min(adapter.rank - rank, kTileRanks)};
}

// Whether two tiles see the same activations. Those of one adapter do.
DEVICE bool sees_the_same(const RankTile& a, const RankTile& b) {
  return a.group == b.group && a.mask.threshold == b.mask.threshold &&
         (a.mask.threshold == 0 || a.mask.stream == b.mask.stream);
}

// Starts Kernel with as many tiles at a time as its params have room for: for each kTiles, so many blocks.
template <class Kernel, class Tile>
void launch_by_tiles(typename Kernel::Params params, const std::vector<Tile>& tiles, int64_t blocks,
                     Stream stream) {
  for (size_t begin = 0; begin < tiles.size(); begin += Kernel::kMaxTiles) {
    params.tiles = static_cast<int>(std::min<size_t>(tiles.size() - begin, Kernel::kMaxTiles));
    std::copy_n(tiles.data() + begin, params.tiles, params.tile);
    launch<Kernel>(params, blocks * ceil_div(params.tiles, Kernel::kTiles), stream,
                   sizeof(typename Kernel::Shared));
  }
}

}  // namespace peft_kernels::cuda
