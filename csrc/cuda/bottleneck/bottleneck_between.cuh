// The step of a bottleneck adapter between its GEMMs: activation and dropout, and their gradient.
#pragma once

#include "../core/activation.cuh"
#include "../core/launch.cuh"
#include "../lora/dropout.cuh"

namespace peft_kernels::cuda {

// Of one adapter.
struct BottleneckStep {
  int rank;
  Activation activation;
  DropoutMask mask;   // of [the adapter's rows, rank]
  const float* bias;  // [rank] or null: of z, forward
};

// fp32, one row per row of activations.
struct BottleneckMatrices {
  float* z;      // forward: written; backward: read
  float* value;  // or null: drop(activation(z))
  float* dz;     // backward, or null
  bool vectors;  // all are aligned to 16 bytes
};

// Four consecutive elements of [the adapter's rows, rank], from a multiple of 4 on: one block of Philox.
struct FourRanks {
  int64_t first;   // among those of the adapter's rows
  int column;      // of the first one
  int64_t at[4];   // their places in the matrices; negative: after the last row
  bool is_vector;  // the places follow each other and are aligned
};

// In matrices [rows, rank] of `count` elements.
DEVICE FourRanks flat_ranks(const BottleneckMatrices& p, int64_t first, int column, int64_t count) {
  FourRanks four{first, column, {}, p.vectors && first + 4 <= count};
#pragma unroll
  for (int i = 0; i < 4; ++i) four.at[i] = first + i < count ? first + i : -1;
  return four;
}

using Floats4 = Vec<float, 4>;

DEVICE Floats4 load_floats(const FourRanks& four, const float* from) {
  if (four.is_vector) return load(reinterpret_cast<const Floats4*>(from + four.at[0]));
  Floats4 floats{};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (four.at[i] >= 0) floats.v[i] = load(from + four.at[i]);
  }
  return floats;
}
DEVICE void store_floats(const FourRanks& four, float* to, const Floats4& floats) {
  if (!to) return;
  if (four.is_vector) return store(reinterpret_cast<Floats4*>(to + four.at[0]), floats);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (four.at[i] >= 0) store(to + four.at[i], floats.v[i]);
  }
}

template <Activation kActivation>
DEVICE void activate_floats(const Floats4& z, ValueGradient (&out)[4]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) out[i] = activate<kActivation>(z.v[i]);
}

// Forward: from the sums of down to the input of up. Backward: from the gradient of that input to dz.
template <bool kBackward>
DEVICE Floats4 between_gemms(const BottleneckStep& p, const BottleneckMatrices& matrices,
                             const FourRanks& four, Floats4 in) {
  Floats4 z = in;
  if constexpr (kBackward) {
    z = load_floats(four, matrices.z);
  } else {
    int column = four.column;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (p.bias) z.v[i] += load_constant(p.bias + column);
      if (++column == p.rank) column = 0;
    }
    store_floats(four, matrices.z, z);
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
    const Words4 words = philox(four.first >> 2, seed, p.mask.stream);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      // Multiplied, so that a NaN stays one.
      const float factor = words.v[i] < p.mask.threshold ? 0.0f : p.mask.scale;
      value.v[i] = __fmul_rn(value.v[i], factor);
      dz.v[i] = __fmul_rn(dz.v[i], factor);
    }
  }
  store_floats(four, matrices.value, value);
  if constexpr (kBackward) {
#pragma unroll
    for (int i = 0; i < 4; ++i) dz.v[i] = __fmul_rn(dz.v[i], a[i].gradient);
    store_floats(four, matrices.dz, dz);
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

  struct Params {
    int64_t count;  // elements of a matrix
    BottleneckStep step;
    BottleneckMatrices matrices;
  };

  static DEVICE void run(const Params& p) {
    const int64_t first = 4 * (int64_t{block_index()} * kThreads + thread_index());
    if (first >= p.count) return;
    const int column = static_cast<int>(first % p.step.rank);
    const FourRanks four = flat_ranks(p.matrices, first, column, p.count);
    const float* from = kBackward ? p.matrices.dz : p.matrices.z;
    const Floats4 in = from ? load_floats(four, from) : Floats4{};
    between_gemms<kBackward>(p.step, p.matrices, four, in);
  }
};

}  // namespace peft_kernels::cuda
