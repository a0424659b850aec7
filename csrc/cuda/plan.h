// Which kernel multiplies with an NF4 weight, and how a product is cut for a card. No device code: the shapes
// of kernels are here, so that host code and kernels share them.
#pragma once

#include "../common/integers.h"
#include "../common/nf4.h"
#include "kernels.h"

namespace peft_kernels::cuda {

inline constexpr int kGroup = 64;  // elements of a row that share a scale, at least

// Where a wide table of pairs lies in the shared memory of a block (see decode.cuh), and how much of it is
// left: before the table, of which the first KB is the system's on some cards, and behind it.
inline constexpr int kWideTableAddress = 0x10000, kWideTableBytes = 0x10000, kNarrowTableBytes = 0x8000;
inline constexpr int kBeforeWideTable = kWideTableAddress - 1024;
inline constexpr int kBehindWideTable = kWideTableAddress + kWideTableBytes;

// How a product is cut: `splits` parts of the contraction, each of `part` units of it. dX: `units` in all, a
// tile's one after another, of which each block takes `part`.
struct Cut {
  int64_t blocks = 0;  // 0: does not fit
  int splits = 1;
  int part = 0;
  int64_t tiles = 0, units = 0;
  int shared_offset = 0, x_offset = 0;
  int64_t shared_bytes = 0;
  int64_t counters = 0, workspace_bytes = 0;
};

// LinearSmall.
struct SmallShape {
  static constexpr int kWarps = 8;
  // Of sums in shared memory: with it no two lanes that write together meet in a bank.
  static constexpr int kSumPitch = 16 + 4;
  // Between rows of x there: the lanes that read together, two rows, lie in different banks.
  static constexpr int kPad = 8;

  int token_tiles, row_tiles;
  bool wide_table;

  constexpr int tokens() const { return 8 * token_tiles; }  // at most
  constexpr int rows() const { return 16 * row_tiles; }     // of the weight, in a tile
  // Of a chunk. In each lane 16 loads of a chunk are under way while the chunk before is computed.
  constexpr int groups() const { return 8 / row_tiles; }
  constexpr int chunk() const { return groups() * kGroup; }
  constexpr int fixed_bytes() const {
    return nf4::kDynamicCodes * 4 + 16 + kWarps * tokens() * kSumPitch * 4;
  }
  // Tiles of tokens are whole, unless there is but one.
  constexpr int64_t x_rows(int64_t m) const { return token_tiles == 1 ? m : tokens(); }
  constexpr int64_t x_bytes(int64_t m, int64_t chunks) const {
    return x_rows(m) * (chunks * chunk() + kPad) * 2;
  }

  Cut cut(int64_t m, int64_t n, int64_t k, const Card& card) const;
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
  constexpr int stages() const { return wide_table || token_tiles == 8 ? 3 : 2; }
  constexpr int stage_bytes() const { return kRows * kColumns / 2 + tokens() * (kRows + kPad) * 2; }
  static constexpr int fixed_bytes() {
    return nf4::kDynamicCodes * 4 + 16 + (kRowWarps - 1) * kColumns * 8 * 4;
  }

  Cut cut(int64_t m, int64_t n, int64_t k, const Card& card) const;
};

// A kernel and the cut for a product; no name: none takes it.
struct Choice {
  const char* name = nullptr;
  SmallShape small{};
  Cut cut{};
};
Choice choose_linear(int64_t m, int64_t n, int64_t k, int block_shift, const Card& card);
struct DxChoice {
  const char* name = nullptr;
  DxShape shape{};
  Cut cut{};
};
DxChoice choose_linear_dx(int64_t m, int64_t n, int64_t k, int block_shift, const Card& card);

}  // namespace peft_kernels::cuda
