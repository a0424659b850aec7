// Bottleneck adapters: up(drop(activation(down(x)))) + residual, and its backward without the gradients of
// parameters.
#pragma once

#include "../core/activation.cuh"
#include "../lora/lora_fragments.cuh"

namespace peft_kernels::cuda {

// ---- Between the GEMMs --------------------------------------------------------------------------------

// Matrices [m, rank].
struct BottleneckMiddle {
  int64_t count;  // m * rank
  int rank;
  Activation activation;
  DropoutMask mask;
  const float* bias;  // [rank] or null: of z
  float* z;           // forward: written
  float* value;       // or null: drop(activation(z))
  float* dz;          // backward, or null
  bool vectors;       // all matrices are aligned to 16 bytes
};

using Floats4 = Vec<float, 4>;

DEVICE Floats4 load_floats(const BottleneckMiddle& p, const float* from, int64_t at) {
  if (p.vectors && at + 4 <= p.count) return load(reinterpret_cast<const Floats4*>(from + at));
  Floats4 floats{};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (at + i < p.count) floats.v[i] = load(from + at + i);
  }
  return floats;
}
DEVICE void store_floats(const BottleneckMiddle& p, float* to, int64_t at, const Floats4& floats) {
  if (!to) return;
  if (p.vectors && at + 4 <= p.count) return store(reinterpret_cast<Floats4*>(to + at), floats);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (at + i < p.count) store(to + at + i, floats.v[i]);
  }
}

template <Activation kActivation>
DEVICE void activate_floats(const Floats4& z, ValueGradient (&out)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = activate<kActivation>(z.v[i]);
}

// Elements first .. first + 3, `first` a multiple of 4: one block of Philox. Forward: from the sums of down
// to the input of up. Backward: from the gradient of that input to dz.
template <bool kBackward>
DEVICE Floats4 between_gemms(const BottleneckMiddle& p, int64_t first, int column, Floats4 in) {
  Floats4 z = in;
  if constexpr (kBackward) {
    z = load_floats(p, p.z, first);
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (p.bias) z.v[i] += load_constant(p.bias + column);
      if (++column == p.rank) column = 0;
    }
    store_floats(p, p.z, first, z);
  }
  ValueGradient a[4];
  switch (p.activation) {
    case Activation::kSilu:
      activate_floats<Activation::kSilu>(z, a);
      break;
    case Activation::kGelu:
      activate_floats<Activation::kGelu>(z, a);
      break;
    case Activation::kGeluTanh:
      activate_floats<Activation::kGeluTanh>(z, a);
      break;
    default:
      activate_floats<Activation::kRelu>(z, a);
  }
  Floats4 value, dz;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    value.v[i] = a[i].value;
    dz.v[i] = in.v[i];
  }
  if (p.mask.threshold != 0) {
    const auto seed = static_cast<uint64_t>(load_constant(p.mask.seed));
    const Words4 words = philox(first >> 2, seed, p.mask.stream);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // Multiplied, so that a NaN stays one.
      const float factor = words.v[i] < p.mask.threshold ? 0.0f : p.mask.scale;
      value.v[i] = __fmul_rn(value.v[i], factor);
      dz.v[i] = __fmul_rn(dz.v[i], factor);
    }
  }
  store_floats(p, p.value, first, value);
  if constexpr (kBackward) {
#pragma unroll
    for (int i = 0; i < 4; ++i) dz.v[i] = __fmul_rn(dz.v[i], a[i].gradient);
    store_floats(p, p.dz, first, dz);
    return dz;
  }
  return value;
}

// Only this step, where the GEMMs are separate kernels: z without its bias, or the gradient of the value in
// dz, is there already.
template <bool kBackward>
struct BottleneckBetween {
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerSm = 4;
  using Params = BottleneckMiddle;

  static DEVICE void run(const Params& p) {
    const int64_t first = 4 * (int64_t{block_index()} * kThreads + thread_index());
    if (first >= p.count) return;
    const float* from = kBackward ? p.dz : p.z;
    const Floats4 in = from ? load_floats(p, from, first) : Floats4{};
    between_gemms<kBackward>(p, first, static_cast<int>(first % p.rank), in);
  }
};

// ---- Both GEMMs in one kernel -------------------------------------------------------------------------

// in [m, in_features] -> intermediate [m, rank] -> out [m, out_features]: x via z to y, or dy via dz to dx. A
// block has 32 rows. In the first half a warp sums 16 of them for up to 64 ranks, over its part of the
// features; in the second it computes all 32 rows for 32 features at a time. The intermediate goes through
// shared memory once.
template <class T, bool kVector, bool kBackward>
struct BottleneckRows {
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerSm = kVector ? 2 : 1;
  static constexpr int kWarps = kThreads / kWarp;
  static constexpr int kRows = 32;  // of a block
  static constexpr int kRowWarps = kRows / 16;
  static constexpr int kTiles = 8;      // of 8 ranks, of a warp
  static constexpr int kFeatures = 32;  // of a warp, at a time
  static constexpr int kMostRanks = kWarps / kRowWarps * kTiles * kTileRanks;

  struct Params {
    const T* in;
    int64_t m, in_features, out_features;
    const void* in_factor;  // down [rank, in_features]; backward: up [in_features, rank]
    bool in_is_f32;
    float in_scale;  // of its sums
    BottleneckMiddle middle;
    int groups;  // number of groups of ranks, each for other warps; the remaining warps have other features
    int tiles;   // of a group
    int ld;      // of the intermediate: 4 modulo 8, so that lanes (g, t) use all banks
    const T* term;  // [m, out_features] or null: added
    RankFactor out_factor;
    const float* bias;  // [out_features] or null
    float out_scale;
    T* out;  // or null: not needed
  };

  static DEVICE void run(const Params& p) {
    const int warp = warp_index(), g = lane_index() / 4, t = lane_index() % 4;
    const int64_t rows = int64_t{block_index()} * kRows;
    const int row = warp % kRowWarps * 16 + g;
    const int rank = warp / kRowWarps % p.groups * p.tiles * kTileRanks;  // first rank of the warp
    const int slice = warp / kRowWarps / p.groups;
    float* between = shared_memory<float>();  // [slice][kRows][ld]
    {
      float sums[kTiles][4] = {};
      if (rows + row - g < p.m) add_features(p, rows + row, rank, slice, g, t, sums);
#pragma unroll
      for (int q = 0; q < kTiles; ++q) {
        if (q >= p.tiles) continue;
        float* to = between + (slice * kRows + row) * p.ld + rank + kTileRanks * q + 2 * t;
        store(reinterpret_cast<Vec<float, 2>*>(to), {sums[q][0], sums[q][1]});
        store(reinterpret_cast<Vec<float, 2>*>(to + 8 * p.ld), {sums[q][2], sums[q][3]});
      }
    }
    __syncthreads();
    add_slices(p, rows, between);
    if (!p.out) return;
    __syncthreads();
    for (int64_t feature = warp * kFeatures; feature < p.out_features; feature += kWarps * kFeatures) {
      write_features(p, rows, feature, g, t, between);
    }
  }

 private:
  static DEVICE int slices(const Params& p) { return kWarps / kRowWarps / p.groups; }

  static DEVICE void add_features(const Params& p, int64_t row, int rank, int slice, int g, int t,
                                  float (&sums)[kTiles][4]) {
    const int64_t windows = (p.in_features + kWindow - 1) / kWindow;
    const int64_t begin = windows * slice / slices(p), end = windows * (slice + 1) / slices(p);
    const T* in[2] = {p.in + row * p.in_features, p.in + (row + 8) * p.in_features};
    // Rows past the end are read as zeros.
    const int64_t in_end[2] = {row < p.m ? p.in_features : 0, row + 8 < p.m ? p.in_features : 0};
    Words4 next[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) next[i] = load_run<T, kVector>(in[i], begin * kWindow + kRun * t, in_end[i]);
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
        if (q >= p.tiles || first >= p.middle.rank) continue;
        const FactorRun factor = load_in_factor(p, first + g, feature);
        add_window<T>(factor, p.in_is_f32, values, sums[q]);
      }
    }
  }

  static DEVICE FactorRun load_in_factor(const Params& p, int rank, int64_t feature) {
    const int64_t end = rank < p.middle.rank ? p.in_features : 0;
    if constexpr (kBackward) {
      return load_factor_column<T>(p.in_factor, p.in_is_f32, rank, p.middle.rank, feature, end);
    } else {
      return load_factor_run<T, kVector>(p.in_factor, p.in_is_f32, rank * p.in_features, feature, end);
    }
  }

  // Adds the slices and leaves the input of the second GEMM in the first slice.
  static DEVICE void add_slices(const Params& p, int64_t rows, float* between) {
    const int rank = p.middle.rank;
    for (int at = 4 * thread_index(); at < kRows * rank; at += 4 * kThreads) {
      const int64_t first = rows * rank + at;
      if (first >= p.middle.count) return;
      int row = at / rank, column = at % rank;
      const int first_column = column;
      int place[4];
      Floats4 sums{};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        place[i] = row * p.ld + column;
        for (int slice = 0; slice < slices(p); ++slice) {
          sums.v[i] += load(between + slice * kRows * p.ld + place[i]);
        }
        sums.v[i] *= p.in_scale;
        if (++column == rank) ++row, column = 0;
      }
      const Floats4 found = between_gemms<kBackward>(p.middle, first, first_column, sums);
#pragma unroll
      for (int i = 0; i < 4; ++i) store(between + place[i], found.v[i]);
    }
  }

  static DEVICE void write_features(const Params& p, int64_t rows, int64_t features, int g, int t,
                                    const float* between) {
    constexpr int kRuns = kRows / 8;
    const int64_t feature = features + kRun * t;
    Words4 terms[kRuns];  // in flight while ranks are summed
#pragma unroll
    for (int i = 0; i < kRuns; ++i) {
      const int64_t row = rows + g + 8 * i;
      terms[i] = load_run<T, kVector>(p.term + row * p.out_features, feature,
                                      p.term && row < p.m ? p.out_features : 0);
    }
    float sums[kRows / 16][4][4] = {};
    for (int rank = 0; rank < p.middle.rank; rank += kTileRanks) {
      float factor[2][4];  // ranks t, t + 4
      Tf32Pair ranks[kRuns][2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int at = rank + t + 4 * j;
        const bool exists = at < p.middle.rank;
        load_four<T, kVector>(p.out_factor, at, features + 4 * g, exists ? p.out_features : 0, factor[j]);
#pragma unroll
        for (int i = 0; i < kRuns; ++i) {
          ranks[i][j] = split_tf32(exists ? load(between + (g + 8 * i) * p.ld + at) : 0.0f);
        }
      }
      add_ranks<kRows / 16>(ranks, factor, sums);
    }
#pragma unroll
    for (int i = 0; i < kRuns; ++i) {
      const int64_t row = rows + g + 8 * i;
      if (row >= p.m) continue;
      float values[kRun], total[kRun];
#pragma unroll
      for (int j = 0; j < kRun; ++j) values[j] = sums[i / 2][j % 4][2 * (i % 2) + j / 4];
      add_bias<kVector>(p.bias, feature, p.out_features, values);
      unpack_run<T>(terms[i], total);
#pragma unroll
      for (int j = 0; j < kRun; ++j) total[j] = add_scaled(total[j], p.out_scale, values[j]);
      store_run<T, kVector>(p.out + row * p.out_features, feature, p.out_features, total);
    }
  }
};

}  // namespace peft_kernels::cuda
