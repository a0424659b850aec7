// Shared by the kernels of adapters: activations and fp32 factors as operands of the tensor core.
//
// Activations are exact as tf32. An fp32 factor is split into the sum of two tf32 values, which drops half a
// unit in the last place: products are as accurate as those of fp32, with its range. Tensor cores truncate
// sums where fp32 rounds, so their sums are kept short and are added up in fp32.
#pragma once

#include "../core/device.cuh"
#include "../core/launch.cuh"
#include "dropout.cuh"
#include "lora.h"

namespace peft_kernels::cuda {

// x plus half a unit (0.34 to 0.69) of the bits that mma_tf32 keeps, so that truncating the lower 13 bits is
// unbiased. Computed by multiplication, which keeps a NaN.
DEVICE float raised_for_tf32(float x) { return __fmaf_rn(x, 0x1.6p-12f, x); }

struct Tf32Pair {
  uint32_t high, low;
};

// mma_tf32 ignores the lower 13 bits of `low`.
DEVICE Tf32Pair split_tf32(float value) {
  const uint32_t high = (bit_cast<uint32_t>(value) + 0x1000u) & 0xffffe000u;
  return {high, bit_cast<uint32_t>(raised_for_tf32(__fadd_rn(value, -bit_cast<float>(high))))};
}

// ---- Runs of eight elements of a row ------------------------------------------------------------------

inline constexpr int kRun = 8;

// Elements [begin, begin + 8) of a row, 0 from `end` on; two per word. kVector: rows are 16-byte aligned,
// begin and end are multiples of 8. kConstant: not written while the kernel runs.
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

// Eight elements of a row of an adapter's factor, fp32 or T, as loaded: one float or two T per word.
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
// Eight elements of a column of the factor, `stride` elements apart.
template <class T>
DEVICE FactorRun load_factor_column(const void* factor, bool is_f32, int64_t column, int64_t stride,
                                    int64_t begin, int64_t end) {
  FactorRun run{};
  const int64_t first = begin * stride + column;
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    if (begin + i >= end) continue;
    const int64_t at = first + i * static_cast<int>(stride);
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

// ---- Dropout ------------------------------------------------------------------------------------------

// Sets to 0 the dropped elements of [first, first + 8) of the activations. kVector: first is a multiple of 4.
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
        // No index that depends on `skipped`: it would move the values to local memory.
#pragma unroll
        for (int i = 0; i < kRun; ++i) {
          if (dropped && i + skipped == 4 * block + j) values[i] = 0.0f;
        }
      }
    }
  }
}

// ---- Features to ranks --------------------------------------------------------------------------------

inline constexpr int kWindow = 32;  // features summed at a time

// sum += values [16 rows, 32 features] times the same features of eight ranks.
template <class T>
DEVICE void add_window(const FactorRun& run, bool is_f32, const float (&values)[2][kRun], float (&sum)[4]) {
  float factor[kRun];
  unpack_factor<T>(run, is_f32, factor);
#pragma unroll
  for (int step = 0; step < kWindow / 8; ++step) {
    const Tf32Pair b[2] = {split_tf32(factor[2 * step]), split_tf32(factor[2 * step + 1])};
    const uint32_t a[4] = {bit_cast<uint32_t>(values[0][2 * step]), bit_cast<uint32_t>(values[1][2 * step]),
                           bit_cast<uint32_t>(values[0][2 * step + 1]),
                           bit_cast<uint32_t>(values[1][2 * step + 1])};
    // Tensor cores truncate where fp32 rounds: the small product goes first, and nothing else is added to it.
    float product[4] = {};
    if (is_f32) mma_tf32(product, a, {b[0].low, b[1].low});
    mma_tf32(product, a, {b[0].high, b[1].high});
#pragma unroll
    for (int i = 0; i < 4; ++i) sum[i] += product[i];
  }
}

// ---- Ranks to features --------------------------------------------------------------------------------

// Element (rank, feature) is at rank * rank_stride + feature * feature_stride.
struct RankFactor {
  const void* data;
  int64_t rank_stride, feature_stride;
  bool is_f32;  // else T
};

// Features begin .. begin + 3 of a rank, 0 from `end` on.
template <class T, bool kVector>
DEVICE void load_four(const RankFactor& factor, int rank, int64_t begin, int64_t end, float (&values)[4]) {
  const int64_t at = rank * factor.rank_stride + begin * factor.feature_stride;
  if (kVector && factor.feature_stride == 1) {
    if (factor.is_f32) {
      using Floats = Vec<float, 4>;
      const auto* from = reinterpret_cast<const Floats*>(static_cast<const float*>(factor.data) + at);
      const Floats floats = begin < end ? load_constant(from) : Floats{};
#pragma unroll
      for (int i = 0; i < 4; ++i) values[i] = floats.v[i];
    } else {
      const auto* from = reinterpret_cast<const Words2*>(static_cast<const T*>(factor.data) + at);
      const Words2 words = begin < end ? load_constant(from) : Words2{};
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        values[2 * i] = low_half<T>(words.v[i]);
        values[2 * i + 1] = high_half<T>(words.v[i]);
      }
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    values[i] = 0.0f;
    if (begin + i >= end) continue;
    const int64_t element = at + i * factor.feature_stride;
    values[i] = factor.is_f32 ? load_constant(static_cast<const float*>(factor.data) + element)
                              : to_float(load_constant(static_cast<const T*>(factor.data) + element));
  }
}

// sums += 16 * kTiles rows by 32 features, summed over eight ranks. A lane has the factor's features 4g .. 4g
// + 3 of ranks t and t + 4, and these ranks of rows g, g + 8, ... Sums are indexed by a feature's position in
// its four, so a lane ends with features 8t .. 8t + 7.
template <int kTiles>
DEVICE void add_ranks(const Tf32Pair (&ranks)[2 * kTiles][2], const float (&factor)[2][4],
                      float (&sums)[kTiles][4][4]) {
#pragma unroll
  for (int q = 0; q < 4; ++q) {
    const Tf32Pair b[2] = {split_tf32(factor[0][q]), split_tf32(factor[1][q])};
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      const Tf32Pair(&top)[2] = ranks[2 * i], (&bottom)[2] = ranks[2 * i + 1];
      const uint32_t high[4] = {top[0].high, bottom[0].high, top[1].high, bottom[1].high};
      const uint32_t low[4] = {top[0].low, bottom[0].low, top[1].low, bottom[1].low};
      mma_tf32(sums[i][q], low, {b[0].high, b[1].high});
      mma_tf32(sums[i][q], high, {b[0].low, b[1].low});
      mma_tf32(sums[i][q], high, {b[0].high, b[1].high});
    }
  }
}

// total + scale * value; the exact bits of total (including the sign of 0) where the product is 0.
DEVICE float add_scaled(float total, float scale, float value) {
  const float sum = __fmaf_rn(scale, value, total);
  return sum == 0.0f ? copysignf(0.0f, total) : sum;
}

// values += features begin .. begin + 7 of a bias, if there is one.
template <bool kVector>
DEVICE void add_bias(const float* bias, int64_t begin, int64_t end, float (&values)[kRun]) {
  if (!bias) return;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    using Floats = Vec<float, 4>;
    Floats floats{};
    const int64_t at = begin + 4 * half;
    if constexpr (kVector) {
      if (at < end) floats = load_constant(reinterpret_cast<const Floats*>(bias + at));
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (at + i < end) floats.v[i] = load_constant(bias + at + i);
      }
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) values[4 * half + i] += floats.v[i];
  }
}

// Stores elements begin .. begin + 7 of a row, up to `end`.
template <class T, bool kVector>
DEVICE void store_run(T* row, int64_t begin, int64_t end, const float (&values)[kRun]) {
  if constexpr (kVector) {
    if (begin >= end) return;
    Words4 words;
#pragma unroll
    for (int i = 0; i < 4; ++i) words.v[i] = pack2<T>(values[2 * i], values[2 * i + 1]);
    store(reinterpret_cast<Words4*>(row + begin), words);
  } else {
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      if (begin + i < end) store(row + begin + i, from_float<T>(values[i]));
    }
  }
}

// ---- Tiles of ranks -----------------------------------------------------------------------------------

inline constexpr int kTileRanks = 8;  // maximum: a tile of the tensor core

// Consecutive ranks of one adapter, and how activations and sums are masked and scaled.
struct RankTile {
  int64_t group;
  DropoutMask mask;  // of the activations
  float scale;       // of the sums
  int column;        // of the first rank, in h or dh
  int ranks;
};

// The tile from `rank` on, for sums with x, or with dY, which has no mask.
inline RankTile rank_tile(const AdapterView& adapter, int rank, bool of_dy) {
  return {adapter.group, of_dy ? DropoutMask{} : adapter.mask, of_dy ? adapter.scaling : adapter.mask.scale,
          static_cast<int>(adapter.h_begin + rank), std::min(adapter.rank - rank, kTileRanks)};
}

// Whether two tiles use the same masked activations, as those of one adapter do.
DEVICE bool uses_same_activations(const RankTile& a, const RankTile& b) {
  return a.group == b.group && a.mask.threshold == b.mask.threshold &&
         (a.mask.threshold == 0 || a.mask.stream == b.mask.stream);
}

// Launches Kernel with as many tiles at a time as its params can hold: `blocks` for every kTiles of them.
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
