// Where GEMM kernels get their tiles of rows, weight and share of the work: one weight for all rows, or a
// weight per expert.
#pragma once

#include "../core/row_tiles.cuh"
#include "linear_shared.cuh"
#include "linear_slab.cuh"

namespace peft_kernels::cuda {

struct OneWeight {
  static constexpr bool kIsMany = false;

  struct Params : LinearParams {
    ShareParams work;
  };

  const Params& p;
  const int token_tiles;

  // Arguments: tokens per tile; the others are used by ManyWeights alone.
  DEVICE OneWeight(const Params& params, int tokens, int, int, int)
      : p(params), token_tiles((params.m + tokens - 1) / tokens) {}

  DEVICE const ShareParams& work() const { return p.work; }
  DEVICE RowTile rows(int token_tile, int tokens) const { return {token_tile * tokens, p.m, 0}; }
  DEVICE int end_of(const RowTile&) const { return p.m; }

  // Selects the weight of a tile's rows.
  DEVICE void move_to(int) {}
  DEVICE const Nf4View& weight() const { return p.weight; }
  DEVICE int bias_row(int, int row) const { return row; }

  template <class T, class Row, class Token, class Sums>
  DEVICE void add_delta(int, int turn, int turns, const Row& row, const Token& token, Sums& sums) const {
    multiply_slab(p, turn, turns, row, token, sums);
  }
  template <class T, class Token, class Sums>
  DEVICE void add_delta_dx(int, int turn, int turns, int column, const Token& token, Sums& sums) const {
    multiply_slab_dx(p, turn, turns, column, token, sums);
  }
};

// Tiles of rows come from a list on the device. Blocks divide the tiles it has; a block without any has
// begin() >= end().
struct ManyWeights {
  static constexpr bool kIsMany = true;

  struct Params : LinearParams {
    ShareParams work;  // without units and share
    ExpertRows rows;
    int64_t packed_stride, code_stride, scale_stride;  // from expert to expert
    ExpertsDelta delta;
  };

  const Params& p;
  const int token_tiles;

  // Whole tiles per block, unless sharing tiles is cheaper by more than `sharing` units.
  DEVICE ManyWeights(const Params& params, int, int feature_tiles, int tile_units, int sharing)
      : p(params), token_tiles(load_constant(params.rows.count)), work_(params.work), weight_(params.weight) {
    const int tiles = feature_tiles * token_tiles, blocks = grid_size();
    const int whole = (tiles + blocks - 1) / blocks * tile_units;
    work_.units = tiles * tile_units;
    const int equal = (work_.units + blocks - 1) / blocks;
    work_.share = equal + sharing < whole ? equal : whole;
  }

  DEVICE const ShareParams& work() const { return work_; }
  DEVICE RowTile rows(int token_tile, int) const { return load_row_tile(p.rows, token_tile); }
  DEVICE int end_of(const RowTile& rows) const { return rows.end; }

  DEVICE void move_to(int expert) {
    weight_.packed = p.weight.packed + expert * p.packed_stride;
    weight_.scale_code = p.weight.scale_code + expert * p.code_stride;
    weight_.scale = p.weight.scale + expert * p.scale_stride;
  }
  DEVICE const Nf4View& weight() const { return weight_; }
  // The offset of one expert.
  DEVICE float scale_offset(int expert, float factor = 1.0f) const {
    return p.weight.scale_offset ? load_constant(p.weight.scale_offset + expert) * factor : 0.0f;
  }
  DEVICE int bias_row(int expert, int row) const { return expert * p.n + row; }

  template <class T, class Row, class Token, class Sums>
  DEVICE void add_delta(int expert, int turn, int turns, const Row& row, const Token& token,
                        Sums& sums) const {
    multiply_delta<T>(p.delta, expert, p.n, turn, turns, row, token, sums);
  }
  template <class T, class Token, class Sums>
  DEVICE void add_delta_dx(int expert, int turn, int turns, int column, const Token& token,
                           Sums& sums) const {
    multiply_delta_dx<T>(p.delta, expert, p.k, turn, turns, column, token, sums);
  }

 private:
  ShareParams work_;
  Nf4View weight_;  // of the current expert
};

}  // namespace peft_kernels::cuda
