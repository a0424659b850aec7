// GEMMs with an NF4 weight: the arguments of kernels, which kernel computes a GEMM, and how its work is
// partitioned over a card. No device code; the tile shapes are shared by host code and kernels.
#pragma once

#include <variant>

#include "../../common/integers.h"
#include "../../common/nf4.h"
#include "../nf4/nf4.h"

namespace peft_kernels::cuda {

// A dense low-rank term u[m, depth] v that is added to the sums of an NF4 GEMM. u and v are bf16, with
// fp16 activations too, since its range is that of fp32; depth is a multiple of 16 (0: none).
struct Slab {
  const void* u;
  const void* v;  // forward [n, depth], used transposed; backward [depth, k]
  int depth;
};

// The adapters' deltas that join a grouped GEMM (a weight per expert), read from the factors themselves.
// ranks [rows, rank]; forward: scale ranks B^T, B [experts, n, rank]; backward: ranks A, A [experts, rank,
// k].
struct ExpertsDelta {
  const float* ranks;
  const void* factor;  // A or B, fp32 or of the activations' type
  bool is_f32;
  int rank;  // 0: none
  float scale;
};

// y = x W^T + u v^T + bias, and dx = dY W + u v. Activations, the packed weight, u and v are 16-byte aligned.
struct LinearParams {
  const void* x;   // [m, k]; dx: dY [m, n]
  DType dtype;     // of x and y: kBF16 or kF16
  Nf4View weight;  // [n, k]
  int m, n, k;
  const void* bias;  // [n] or null
  DType bias_dtype;
  Slab slab;
  void* y;  // [m, n]; dx: [m, k]
};

// Of a row's elements: as many share a scale, or more, but where scales are codes.
inline constexpr int kGroup = 64;

// The wide table of pairs (see linear_decode.cuh) is at a fixed address of shared memory, wherever a block's
// memory starts. Data after it starts at kBehindWideTable. Data before it has the space up to the table less
// what the system reserves, which suffices for all kernels if that is at most kMostReserved.
inline constexpr int kWideTableAddress = 0x10000, kWideTableBytes = 0x10000, kNarrowTableBytes = 0x8000;
inline constexpr int kBehindWideTable = kWideTableAddress + kWideTableBytes;
inline constexpr int kMostReserved = 8 << 10;
inline bool has_wide_table(const Card& card) {
  return card.shared_bytes >= 160 << 10 && card.reserved_bytes <= kMostReserved;
}

// The partition of a GEMM: the work units of all tiles, tile after tile, in shares of `part` units, one per
// block or, in LinearSmall, per warp. LinearSmall first divides the sums of every tile into `splits` slices
// of k, with separate blocks for each.
struct Cut {
  int64_t blocks = 0;  // 0: does not fit
  int splits = 1;
  int part = 0;
  int64_t tiles = 0, units = 0;
  int shared_offset = 0, x_offset = 0;
  int64_t shared_bytes = 0;
  int64_t counters = 0, workspace_bytes = 0;
};

// The work of a plan in equal units, each `features` of the result by `tokens` by `depth` terms of their
// sums; no worker has more than `share` units.
struct Load {
  int64_t features, tokens, depth;
  int64_t share;
  int workers;  // per multiprocessor: its warps, or the one block on it, whose warps share units
};

// LinearSmall.
struct SmallShape {
  static constexpr int kWarps = 8;
  // Between rows of x in shared memory: the lanes that read together, two rows, lie in different banks.
  static constexpr int kPad = 8;

  int token_tiles, row_tiles;
  bool wide_table;
  bool has_scale_codes = false;  // 2 or 4 in a group: scales are codes of values in a table

  constexpr int tokens() const { return 8 * token_tiles; }  // at most
  constexpr int rows() const { return 16 * row_tiles; }     // of the weight, in a tile
  // Per chunk. Each lane has 16 loads of a chunk in flight while it computes the chunk before.
  constexpr int groups() const { return 8 / row_tiles; }
  // The map of scales, a flag per thread, and the sums of the tile that each warp continues.
  constexpr int fixed_bytes() const {
    return nf4::kDynamicCodes * 4 + kWarps * 32 * 4 + kWarps * tokens() * rows() * 4;
  }
  // Token tiles are complete, except when there is only one.
  constexpr int64_t x_rows(int64_t m) const { return token_tiles == 1 ? m : tokens(); }
  constexpr int64_t x_bytes(int64_t m, int64_t groups) const {
    return x_rows(m) * (groups * kGroup + kPad) * 2;
  }

  Cut cut(int64_t m, int64_t n, int64_t k, const Card& card) const;
  Load load(const Cut& cut) const;
};

// LinearDx.
struct DxShape {
  static constexpr int kColumnWarps = 4, kRowWarps = 2;
  static constexpr int kColumns = kColumnWarps * kGroup;  // of the weight, in a tile
  static constexpr int kRows = kRowWarps * kGroup;        // in a stage
  // Between rows of dY there: the lanes that read together, two rows, lie in different banks.
  static constexpr int kPad = 8;

  int token_tiles;
  bool wide_table;

  constexpr int tokens() const { return 8 * token_tiles; }  // in a tile
  // Cards with little shared memory can hold two.
  constexpr int stages() const { return wide_table || token_tiles > 4 ? 3 : 2; }
  constexpr int stage_bytes() const { return kRows * kColumns / 2 + tokens() * (kRows + kPad) * 2; }
  static constexpr int fixed_bytes() {
    return nf4::kDynamicCodes * 4 + 16 + (kRowWarps - 1) * kColumns * 8 * 4;
  }

  Cut cut(int64_t m, int64_t n, int64_t k, const Card& card) const;
  Load load(const Cut& cut) const;
};

// LinearTiles.
struct TileShape {
  static constexpr int kWarps = 8;
  static constexpr int kRowTiles = 2;  // of a warp
  static constexpr int kTokens = 64;
  static constexpr int kStages = 3;       // in the ring
  static constexpr int kChunkStages = 4;  // in a chunk, with one scale per lane for each stage
  // Between rows of x: the lanes that read together, two rows, lie in different banks.
  static constexpr int kPad = 8;

  int feature_warps;  // the other warps take other groups of k
  bool wide_table;

  constexpr int rows() const { return feature_warps * 16 * kRowTiles; }  // of the weight, in a tile
  constexpr int depth_warps() const { return kWarps / feature_warps; }
  constexpr int depth() const { return depth_warps() * kGroup; }  // of a stage
  constexpr int fixed_bytes() const {
    return kStages * kTokens * (depth() + kPad) * 2 + nf4::kDynamicCodes * 4 + 16;
  }
  // Estimated cost of a stage, and of combining the partial sums of a shared tile, in stages. A stage of
  // smaller tiles is as much work but reads more of x. On H100 a stage is about 1000 clocks of the matrix
  // units, and the round trip of partial sums through the L2 cache twice that; on other cards stages take
  // longer.
  constexpr int64_t stage_cost() const { return depth_warps() == 1 ? 8 : 9; }
  constexpr int64_t sharing_stages() const { return depth_warps() == 1 ? 4 : 2; }
  // The data fits before the wide table.
  constexpr int shared_offset() const { return wide_table ? 0 : kNarrowTableBytes; }

  int64_t tiles(int64_t m, int64_t n) const;
  // The stages of a block: whole tiles, or the same number for all blocks.
  struct Share {
    int64_t stages, cost;
  };
  Share share(int64_t m, int64_t n, int64_t k, const Card& card) const;
  Cut cut(int64_t m, int64_t n, int64_t k, const Card& card) const;
  Load load(const Cut& cut) const;
};

// LinearWgmma, for compute capability 9.0.
struct WgmmaShape {
  static constexpr int kFeatures = 128;  // of a tile: two warpgroups of 64
  static constexpr int kDepth = kGroup;  // of a stage: terms of the sums
  static constexpr int kWeightBytes = kFeatures * kDepth / 2, kScaleBytes = kFeatures * 4;  // of a stage

  int tokens;  // of a tile: 64, 128 or 256
  bool is_dx;

  constexpr int x_bytes() const { return tokens * kDepth * 2; }  // of a stage
  constexpr int stages() const { return tokens == 256 ? 4 : tokens == 128 ? 6 : 8; }
  // Addresses in shared memory, wherever a block's own starts. Between the system's part and the table of
  // pairs are codes, scales, barriers and one stage of x; after the table are the other stages.
  constexpr int weights() const { return kMostReserved; }
  constexpr int scales() const { return weights() + stages() * kWeightBytes; }
  constexpr int map() const { return scales() + stages() * kScaleBytes; }
  constexpr int barriers() const { return map() + nf4::kDynamicCodes * 4; }
  constexpr int last() const { return barriers() + 2 * stages() * 8; }
  constexpr int first_x() const { return kWideTableAddress - x_bytes(); }
  constexpr int other_x() const { return kBehindWideTable; }
  constexpr int end() const { return other_x() + (stages() - 1) * x_bytes(); }
  constexpr bool fits() const { return last() + 4 <= first_x(); }
  // Estimated cost of a stage in clocks. The matrix units need 4 per token; with few tokens shared memory,
  // which lookups in the table share with x, and the issue of instructions take longer. Combining the partial
  // sums of a shared tile passes them through the L2 cache twice.
  constexpr int64_t stage_cost() const { return tokens == 64 ? 336 : tokens == 128 ? 544 : 1024; }
  static constexpr int64_t kSharingStages = 16;

  int64_t tiles(int64_t m, int64_t n, int64_t k) const;
  int64_t tile_stages(int64_t n, int64_t k) const { return ceil_div(is_dx ? n : k, int64_t{kDepth}); }
  // The stages of a block: whole tiles, or the same number for all blocks.
  struct Share {
    int64_t stages, cost;
  };
  Share share(int64_t m, int64_t n, int64_t k, const Card& card) const;
  Cut cut(int64_t m, int64_t n, int64_t k, const Card& card) const;
  Load load(const Cut& cut) const;
};
static_assert(WgmmaShape{64}.fits() && WgmmaShape{128}.fits() && WgmmaShape{256}.fits());

// The kernel and partition of a GEMM, or none; depends on the shape, the card and its crossovers alone.
struct LinearPlan {
  const char* name = "pieces";  // of the kernel; "pieces": none, the caller dequantises piece by piece
  std::variant<SmallShape, TileShape, DxShape, WgmmaShape> shape{};
  Cut cut{};

  bool has_kernel() const { return cut.blocks != 0; }
  Load load() const;
  // `params` must have the shape that was planned.
  void start(const LinearParams& params, Context& context) const;
};
// kByTable: by the rows and the crossovers of the card (crossovers.h); the others: whatever those say.
enum class Kernels { kByTable, kMmaSync, kWgmma };
LinearPlan plan_linear(bool is_dx, DType dtype, int64_t m, int64_t n, int64_t k, int block_shift,
                       const Card& card, Kernels kernels = Kernels::kByTable);
// A plan for a weight with scale codes, in blocks of 16 or 32: few rows, forward, in bf16. In fp16 a value of
// a scale may be out of range.
LinearPlan plan_scale_codes(bool is_dx, DType dtype, int64_t m, int64_t n, int64_t k, int block_shift,
                            const Card& card);
// LinearWgmma's plan, or none where the build or the card lacks it. For arguments that LinearTiles or
// LinearDx accepts.
LinearPlan plan_wgmma(bool is_dx, int64_t m, int64_t n, int64_t k, const Card& card);

// Without a kernel: how many of a weight's `count` rows or columns, of `length` elements each, to dequantise
// at a time for torch's matmul. A multiple of 256; may exceed `count`.
int64_t piece_of(int64_t count, int64_t length, int64_t element_size, int64_t most_bytes = 128 << 20);

// One file per kernel: linear_small.cu, linear_tiles.cu, linear_dx.cu, linear_wgmma.cu.
void start_kernel(const SmallShape& shape, const Cut& cut, const LinearParams& params, Context& context);
void start_kernel(const TileShape& shape, const Cut& cut, const LinearParams& params, Context& context);
void start_kernel(const DxShape& shape, const Cut& cut, const LinearParams& params, Context& context);
void start_kernel(const WgmmaShape& shape, const Cut& cut, const LinearParams& params, Context& context);

}  // namespace peft_kernels::cuda
