// Packs the deltas of adapters into one dense product u v of bf16 values, added to the base GEMM.
#pragma once

#include "../core/device.cuh"

namespace peft_kernels::cuda {

// One factor of an adapter's delta: element (row, rank) at row * row_stride + rank * rank_stride.
struct SlabFactor {
  const void* data;
  int64_t row_stride, rank_stride;
  float scale;
  bool is_f32;  // else T
};
struct SlabAdapter {
  SlabFactor factor[2];  // of u and of v
  int rank;
  int parts;
};

// A factor is split into the sum of two bf16 values, high + low, and a product of two factors is computed
// as high high + low high + high low; what is left out is below the precision of fp16 and bf16. So an adapter
// has three parts, each as deep as its rank; two if the factor of v is bf16 itself. The rest of the depth is
// filled with zeros.
template <class T>
struct PackSlab {
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerSm = 4;
  static constexpr int kMaxAdapters = 24;

  struct Side {
    bf16* out;
    int64_t rows;
    bool transposed;  // out is [depth, rows], else [rows, depth]
  };
  struct Params {
    Side side[2];
    int64_t blocks_of_u;
    int64_t ld;          // of the whole slab: its depth
    int64_t begin, end;  // the part of it that is written
    int adapters;
    SlabAdapter adapter[kMaxAdapters];
  };

  static DEVICE void run(const Params& p) {
    const int which = block_index() >= p.blocks_of_u;
    const Side& side = p.side[which];
    const int64_t i = (block_index() - (which ? p.blocks_of_u : 0)) * kThreads + thread_index();
    const int64_t depth = p.end - p.begin;
    if (i >= side.rows * depth) return;
    const int64_t row = side.transposed ? i % side.rows : i / depth;
    const int64_t at = side.transposed ? i / side.rows : i % depth;
    const int64_t to = side.transposed ? (p.begin + at) * side.rows + row : row * p.ld + p.begin + at;
    store(side.out + to, element(p, which, row, at));
  }

 private:
  static DEVICE bf16 element(const Params& p, int which, int64_t row, int64_t at) {
    for (int i = 0; i < p.adapters; ++i) {
      const SlabAdapter& adapter = p.adapter[i];
      const int64_t depth = int64_t{adapter.rank} * adapter.parts;
      if (at >= depth) {
        at -= depth;
        continue;
      }
      const SlabFactor& factor = adapter.factor[which];
      const int part = static_cast<int>(at / adapter.rank);
      const int64_t from = row * factor.row_stride + at % adapter.rank * factor.rank_stride;
      const float value = factor.is_f32 ? load_constant(static_cast<const float*>(factor.data) + from)
                                        : to_float(load_constant(static_cast<const T*>(factor.data) + from));
      const float scaled = __fmul_rn(factor.scale, value);
      const bf16 high = from_float<bf16>(scaled);
      // u's low part is the second, v's the third.
      return part == 1 + which ? from_float<bf16>(__fadd_rn(scaled, -to_float(high))) : high;
    }
    return from_float<bf16>(0.0f);
  }
};

}  // namespace peft_kernels::cuda
