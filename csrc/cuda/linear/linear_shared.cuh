// Shared by the kernels of NF4 GEMMs: the dispatch to an instance, the last terms of sums, and partial sums
// of warps and blocks.
#pragma once

#include "../core/launch.cuh"
#include "../core/sum_splits.cuh"
#include "../nf4/nf4_tables.cuh"
#include "linear_decode.cuh"

namespace peft_kernels::cuda {

// Calls `body` with a value of the activations' type and a table.
template <class Body>
void with_operands(DType dtype, bool wide_table, const Body& body) {
  with_half(dtype, [&](auto type) { wide_table ? body(type, WideTable{}) : body(type, NarrowTable{}); });
}

template <int kRowTiles, int kTokenTiles>
DEVICE void multiply_sums(float (&sums)[kRowTiles][kTokenTiles][4], float factor) {
#pragma unroll
  for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
    for (int i = 0; i < kTokenTiles; ++i) {
#pragma unroll
      for (int e = 0; e < 4; ++e) sums[r][i][e] *= factor;
    }
  }
}
// Divides out kCodeFactor, by which decoded weights were multiplied.
template <class T, int kRowTiles, int kTokenTiles>
DEVICE void remove_code_factor(float (&sums)[kRowTiles][kTokenTiles][4]) {
  multiply_sums(sums, 1.0f / kCodeFactor<T>);
}

DEVICE float load_as_float(const void* p, DType dtype, int64_t i) {
  if (dtype == DType::kF32) return load_constant(static_cast<const float*>(p) + i);
  if (dtype == DType::kBF16) return to_float(load_constant(static_cast<const bf16*>(p) + i));
  return to_float(load_constant(static_cast<const fp16*>(p) + i));
}

// ---- Partial sums of warps and blocks -----------------------------------------------------------------

using Four = Vec<float, 4>;  // a lane's sums of one matrix instruction

DEVICE void add(const Four& more, float (&sum)[4]) {
#pragma unroll
  for (int e = 0; e < 4; ++e) sum[e] += more.v[e];
}

struct AllTokens {
  DEVICE bool operator()(int) const { return true; }
};

// Stores or adds a lane's partial sums of a tile, `stride` from one matrix instruction's to the next, for the
// token tiles for which has(i).
template <int kRowTiles, int kTokenTiles, class Has>
DEVICE void store_part(const float (&sums)[kRowTiles][kTokenTiles][4], Four* part, int stride,
                       const Has& has) {
#pragma unroll
  for (int i = 0; i < kTokenTiles; ++i) {
    if (!has(i)) continue;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r)
      store(part + (i * kRowTiles + r) * stride, bit_cast<Four>(sums[r][i]));
  }
}
template <int kRowTiles, int kTokenTiles, class Has>
DEVICE void add_part(const Four* part, int stride, const Has& has, float (&sums)[kRowTiles][kTokenTiles][4]) {
#pragma unroll
  for (int i = 0; i < kTokenTiles; ++i) {
    if (!has(i)) continue;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) add(load(part + (i * kRowTiles + r) * stride), sums[r][i]);
  }
}

// The partition of LinearSmall: k in slices, and of each slice equal shares of all tiles' groups for the
// warps of its blocks.
struct SliceParams {
  int splits, groups;  // number of slices, and the groups that each has at least
  int longer;          // number of slices, the first ones, with one more group
  int tiles, share;    // a warp's share
  bool shares_tiles;   // whether any tile is shared by blocks
  uint32_t* counter;   // [tiles]
  float* partial;      // [splits, tiles + blocks of a slice, elements of a tile]

  DEVICE int begin_of(int slice) const { return slice * groups + (slice < longer ? slice : longer); }
  DEVICE int most_groups() const { return groups + (longer > 0); }
};
// A block's slice and the shares of its warps.
struct SliceOfWork {
  const SliceParams& p;
  int index, block, blocks;  // the slice, and the index and number of its blocks
  int begin, groups;

  DEVICE explicit SliceOfWork(const SliceParams& params)
      : p(params),
        index(block_index() % p.splits),
        block(block_index() / p.splits),
        blocks(grid_size() / p.splits),
        begin(p.begin_of(index)),
        groups(p.begin_of(index + 1) - begin) {}

  // The first unit of a warp; for the warp after the last, the end of the last one's share.
  DEVICE int share_begin(int warp) const {
    const int at = (block * kWarpsOfBlock + warp) * p.share, units = p.tiles * groups;
    return at < units ? at : units;
  }

  // The blocks of a slice that have groups of a tile.
  struct Blocks {
    int first, last;
  };
  DEVICE Blocks blocks_of(int slice, int tile) const {
    const int length = p.begin_of(slice + 1) - p.begin_of(slice), units = p.share * kWarpsOfBlock;
    return {tile * length / units, ((tile + 1) * length - 1) / units};
  }
  DEVICE int parts_of(int tile) const {
    int parts = 0;
    // Not unrolled, here and below: few iterations, not worth the code.
#pragma unroll 1
    for (int slice = 0; slice < p.splits; ++slice) {
      const Blocks sharing = blocks_of(slice, tile);
      parts += sharing.last - sharing.first + 1;
    }
    return parts;
  }
  // The index of this block's partial sums. Consecutive parts of a slice differ by one in tile or in block.
  DEVICE int64_t part(int tile) const { return part(index, block, tile); }
  DEVICE int64_t part(int slice, int of_block, int tile) const {
    return int64_t{slice} * (p.tiles + blocks) + of_block + tile;
  }
  template <class Body>
  DEVICE void for_each_part(int tile, const Body& body) const {
#pragma unroll 1
    for (int slice = 0; slice < p.splits; ++slice) {
      const Blocks sharing = blocks_of(slice, tile);
      for (int at = sharing.first; at <= sharing.last; ++at) body(part(slice, at, tile));
    }
  }

 private:
  static constexpr int kWarpsOfBlock = SmallShape::kWarps;
};

// The partition of LinearTiles and LinearDx: equal shares of all tiles' units, tile after tile, so a tile may
// start in one block and end in another.
struct ShareParams {
  int units, share;   // total, per block
  uint32_t* counter;  // [tiles]
  float* partial;     // [blocks, 2, elements of a tile]

  DEVICE int begin() const { return block_index() * share; }
  DEVICE int end() const { return units - begin() < share ? units : begin() + share; }
};

inline ShareParams share_params(const Cut& cut, Context& context) {
  return {static_cast<int>(cut.units), cut.part, context.counters(cut.counters),
          static_cast<float*>(context.workspace(cut.workspace_bytes))};
}

// The blocks that have units of a tile.
struct Sharers {
  const ShareParams& p;
  int tile, first, last;

  DEVICE Sharers(const ShareParams& params, int of_tile, int tile_units)
      : p(params),
        tile(of_tile),
        first(tile * tile_units / p.share),
        last(((tile + 1) * tile_units - 1) / p.share) {}

  DEVICE bool is_first() const { return block_index() == first; }
  DEVICE bool is_one() const { return first == last; }
  // A block shares at most two tiles with others: one that others began, and one that it begins.
  DEVICE float* partial_of(int block, int64_t tile_elements) const {
    return p.partial + (2 * block + (block == first)) * tile_elements;
  }
  DEVICE bool is_last_block(uint32_t* shared_word) const {
    return is_last_of_tile(p.counter + tile, last - first + 1, shared_word);
  }
};

}  // namespace peft_kernels::cuda
