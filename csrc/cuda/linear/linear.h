// Products with an NF4 weight: what kernels take, which of them takes a product, and how that is cut for a
// card. No device code: the shapes of kernels are here, so that host code and kernels share them.
#pragma once

#include <variant>

#include "../../common/integers.h"
#include "../../common/nf4.h"
#include "../core/kernels.h"

namespace peft_kernels::cuda {

// A dense product that joins an NF4 product in the same sums: u[m, depth] v, both of the activations' 16-bit
// type, depth a multiple of 16 (0: none).
struct Slab {
  const void* u;
  const void* v;  // forward [n, depth], used transposed; backward [depth, k]
  int depth;
};

// y = x W^T + u v^T + bias, and dx = dY W + u v. Activations, the packed weight, u and v start at multiples
// of 16 bytes.
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

inline constexpr int kGroup = 64;  // elements of a row that share a scale, at least

// Where a wide table of pairs lies in shared memory (see linear_decode.cuh): at a fixed address, wherever a
// block's memory starts. What is behind it is at this offset of the block's memory; before it there is room
// up to the table, less what the system has there, which all kernels can do with where that is not more than
// kMostReserved.
inline constexpr int kWideTableAddress = 0x10000, kWideTableBytes = 0x10000, kNarrowTableBytes = 0x8000;
inline constexpr int kBehindWideTable = kWideTableAddress + kWideTableBytes;
inline constexpr int kMostReserved = 8 << 10;
inline bool has_wide_table(const Card& card) {
  return card.shared_bytes >= 160 << 10 && card.reserved_bytes <= kMostReserved;
}

// How a product is cut: the units of all tiles, tile after tile, in shares of `part`, one for each block or,
// in LinearSmall, for each warp. There every tile's sums are cut in `splits` slices beforehand, each of which
// has blocks of its own.
struct Cut {
  int64_t blocks = 0;  // 0: does not fit
  int splits = 1;
  int part = 0;
  int64_t tiles = 0, units = 0;
  int shared_offset = 0, x_offset = 0;
  int64_t shared_bytes = 0;
  int64_t counters = 0, workspace_bytes = 0;
};

// What a plan makes of a product: equal units of work, each one `features` of the result by `tokens` and by
// `depth` terms of their sums, of which no worker has more than `share`.
struct Load {
  int64_t features, tokens, depth;
  int64_t share;
  int workers;  // of a multiprocessor: its warps, or the one block on it, whose warps share units
};

// LinearSmall.
struct SmallShape {
  static constexpr int kWarps = 8;
  // Between rows of x in shared memory: the lanes that read together, two rows, lie in different banks.
  static constexpr int kPad = 8;

  int token_tiles, row_tiles;
  bool wide_table;

  constexpr int tokens() const { return 8 * token_tiles; }  // at most
  constexpr int rows() const { return 16 * row_tiles; }     // of the weight, in a tile
  // Of a chunk. In each lane 16 loads of a chunk are under way while the chunk before is computed.
  constexpr int groups() const { return 8 / row_tiles; }
  // The map of scales, a flag for each thread, and a warp's sums of the tile that another one began.
  constexpr int fixed_bytes() const {
    return nf4::kDynamicCodes * 4 + kWarps * 32 * 4 + kWarps * tokens() * rows() * 4;
  }
  // Tiles of tokens are whole, unless there is but one.
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
  // Two are what cards with little shared memory have room for.
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
  static constexpr int kChunkStages = 4;  // of a chunk, of which a lane has a scale each
  // Between rows of x: the lanes that read together, two rows, lie in different banks.
  static constexpr int kPad = 8;

  int feature_warps;  // the others take other groups of k
  bool wide_table;

  constexpr int rows() const { return feature_warps * 16 * kRowTiles; }  // of the weight, in a tile
  constexpr int depth_warps() const { return kWarps / feature_warps; }
  constexpr int depth() const { return depth_warps() * kGroup; }  // of a stage
  constexpr int fixed_bytes() const {
    return kStages * kTokens * (depth() + kPad) * 2 + nf4::kDynamicCodes * 4 + 16;
  }
  // How long a block takes for a stage, and how many it could do while a tile's parts are put together:
  // estimates. A stage of smaller tiles is as much work, with more of x to be read. On H100 it is about 1000
  // clocks of the matrix units, and a part's way through the L2 cache twice that; on other cards stages take
  // longer.
  constexpr int64_t stage_cost() const { return depth_warps() == 1 ? 8 : 9; }
  constexpr int64_t sharing_stages() const { return depth_warps() == 1 ? 4 : 2; }
  // There is room before the wide table.
  constexpr int shared_offset() const { return wide_table ? 0 : kNarrowTableBytes; }

  int64_t tiles(int64_t m, int64_t n) const;
  // Of all tiles' stages, a block's: whole tiles, or the same number for all blocks.
  struct Share {
    int64_t stages, cost;
  };
  Share share(int64_t m, int64_t n, int64_t k, const Card& card) const;
  Cut cut(int64_t m, int64_t n, int64_t k, const Card& card) const;
  Load load(const Cut& cut) const;
};

// A product as it is planned, once, from the shape and the card alone: a kernel and a cut, or none.
struct LinearPlan {
  const char* name = "pieces";  // of the kernel; none: the caller dequantises piece by piece
  std::variant<SmallShape, TileShape, DxShape> shape{};
  Cut cut{};

  bool has_kernel() const { return cut.blocks != 0; }
  Load load() const;
  // With params of the shape that it was planned for.
  void start(const LinearParams& params, Context& context) const;
};
LinearPlan plan_linear(DType dtype, int64_t m, int64_t n, int64_t k, int block_shift, const Card& card);
LinearPlan plan_linear_dx(DType dtype, int64_t m, int64_t n, int64_t k, int block_shift, const Card& card);

// Where there is no kernel: how many of a weight's `count` rows or columns, of `length` elements each, are to
// be dequantised at a time, for torch's product. A multiple of 256, or more than there are.
int64_t piece_of(int64_t count, int64_t length, int64_t element_size);

// The kernels, each in a file of its own.
void start_kernel(const SmallShape& shape, const Cut& cut, const LinearParams& params, Context& context);
void start_kernel(const TileShape& shape, const Cut& cut, const LinearParams& params, Context& context);
void start_kernel(const DxShape& shape, const Cut& cut, const LinearParams& params, Context& context);

}  // namespace peft_kernels::cuda
