// dx = dY W with an NF4 weight, for few rows of dY ("tokens"), where reading the weight dominates.
//
// Sums run along the rows of the weight, and the matrix instruction's first operand is W^T: 16 columns
// ("features") by 16 rows, with dY^T, 8 tokens wide, as the second. A register of an operand holds two rows
// of a column, but a byte holds two columns of a row: nibbles of two rows are exchanged before the lookup.
//
// Blocks have equal shares of the work, in units of half stages of rows for a tile of columns by tokens.
// Codes and dY of a stage pass through a ring in shared memory. Some warps of a block share the columns of a
// tile, the others the rows of a stage.
#pragma once

#include <type_traits>

#include "linear_groups.cuh"

namespace peft_kernels::cuda {

template <class T, class Table, int kTokenTiles, class Groups>
struct LinearDxOf {
  static constexpr DxShape kShape{kTokenTiles, Table::kIsWide};
  static constexpr int kStages = kShape.stages();
  static constexpr int kColumnWarps = DxShape::kColumnWarps, kRowWarps = DxShape::kRowWarps;
  static constexpr int kThreads = kColumnWarps * kRowWarps * kWarp;
  static constexpr int kBlocksPerSm = 1;
  static constexpr int kTokens = kShape.tokens();
  static constexpr int kColumns = DxShape::kColumns, kRows = DxShape::kRows;
  static constexpr int kFeatureTiles = kGroup / 16;

  // Scales are rounded to 16 bits. With few tokens they multiply dY, otherwise the decoded weight; for fp16
  // always the weight, because small gradients times scales would underflow.
  static constexpr bool kScalesDy = std::is_same_v<T, bf16> && kTokenTiles <= 4;

  static constexpr float kFactor = 1.0f / kCodeFactor<T>;  // of scales

  struct Params : Groups::Params {     // shares are by half stages
    int shared_offset, stages_offset;  // offsets of Shared and the stages in shared memory
  };
  struct Shared {
    float map[nf4::kDynamicCodes];
    alignas(16) uint32_t last;
    alignas(16) Four sum[kRowWarps - 1][kColumnWarps][kFeatureTiles][kWarp];  // of 8 tokens
  };
  struct Stage {
    uint8_t weight[kRows][kColumns / 2];  // see code_unit()
    T dy[kTokens][kRows + DxShape::kPad];
  };
  static_assert(sizeof(Shared) == DxShape::fixed_bytes());
  static_assert(sizeof(Stage) == kShape.stage_bytes());

  static DEVICE void run(const Params& p) {
    LinearDxOf self(p);
    if (Groups::kIsMany && self.begin_ >= self.groups_.work().end()) return;
    self.start_loading();
    self.table_ = fill_table<T, Table, kThreads>(
        p.weight, shared_memory<uint8_t>(), p.stages_offset == 0 ? kStages * sizeof(Stage) : sizeof(Shared));
    fill_map<kThreads>(p.weight, self.shared_->map, kFactor);
    bool begins_halfway = self.begin_ % 2 != 0;
    while (self.stage_ < self.end_) {
      Sums sums{};
      const int first = self.stage_, steps = self.steps_;
      const int tile = first / steps, next_tile = (tile + 1) * steps;
      const RowTile tokens = self.tokens_of(tile);
      if constexpr (Groups::kIsMany) self.scale_offset_ = self.groups_.scale_offset(tokens.expert, kFactor);
      const bool is_last = self.end_ <= next_tile;
      const int end = is_last ? self.end_ : next_tile;
      if (begins_halfway) self.template multiply_next<2, 4>(sums);
      begins_halfway = false;
      const bool ends_halfway = is_last && self.groups_.work().end() % 2 != 0;
      const int whole_end = end - ends_halfway;
      while (self.stage_ < whole_end) {
        // Up to the end of the tile being loaded, to keep the change to the next out of the main loop.
        const int fetched_end = self.stage_ + (self.rows_left_ + kRows - 1) / kRows;
        const int stop = whole_end < fetched_end ? whole_end : fetched_end;
        for (; self.stage_ < stop; ++self.stage_) self.template multiply_stage<0, 4>(sums);
        if (self.rows_left_ <= 0) self.start_next_tile();
      }
      if (ends_halfway) self.template multiply_next<0, 2>(sums);
      self.finish(tile, tokens, sums);
    }
  }

 private:
  struct Sums {
    float c[kFeatureTiles][kTokenTiles][4];
  };

  const Params& p_;
  const int column_warp_, row_warp_, g_, t_;
  const int steps_;  // of a tile
  Groups groups_;
  Shared* const shared_;
  Stage* const stages_;
  const uint32_t row_bytes_, row_scales_;
  float scale_offset_;
  Table table_{};

  const int begin_;  // in half stages
  int stage_, end_;  // in stages, rounded to include partial ones
  int slot_ = 0;     // of the stage, in the ring

  // The next stage to be loaded, and the scales in flight.
  int column_;
  RowTile tokens_;
  int tile_;  // ManyWeights
  int rows_left_, tokens_after_;
  const uint8_t* codes_at_;
  const uint8_t* dy_at_;  // in bytes
  uint32_t scale_at_;
  PackedScale scales_[kStages - 1][2];

  DEVICE explicit LinearDxOf(const Params& p)
      : p_(p),
        column_warp_(warp_index() % kColumnWarps),
        row_warp_(warp_index() / kColumnWarps),
        g_(lane_index() / 4),
        t_(lane_index() % 4),
        steps_((p.n + kRows - 1) / kRows),
        groups_(p, kTokens, (p.k + kColumns - 1) / kColumns, 2 * steps_, 0),
        shared_(reinterpret_cast<Shared*>(shared_memory<uint8_t>() + p.shared_offset)),
        stages_(reinterpret_cast<Stage*>(shared_memory<uint8_t>() + p.stages_offset)),
        row_bytes_(static_cast<uint32_t>(p.k / 2)),
        row_scales_(static_cast<uint32_t>(p.k >> p.weight.block_shift)),
        scale_offset_(load_scale_offset(p.weight, kFactor)),
        begin_(groups_.work().begin()),
        stage_(begin_ / 2),
        end_((groups_.work().end() + 1) / 2) {}

  // The first column of a tile.
  DEVICE int column_of(int tile) const { return tile / groups_.token_tiles * kColumns; }
  DEVICE RowTile tokens_of(int tile) const { return groups_.rows(tile % groups_.token_tiles, kTokens); }

  // ---- Loading codes, dY and scales -------------------------------------------------------------------

  // A thread's part of a stage. Codes: the same 16 bytes of every kCodeRows-th row. dY: the same 8 rows of
  // every kDyTokens-th token.
  static constexpr int kCodeUnits = kColumns / 32, kCodeRows = kThreads / kCodeUnits;
  static constexpr int kDyUnits = kRows / 8, kDyTokens = kThreads / kDyUnits;
  static DEVICE int code_row() { return thread_index() / kCodeUnits; }
  static DEVICE int dy_row() { return thread_index() % kDyUnits * 8; }
  static DEVICE int dy_token() { return thread_index() / kDyUnits; }
  // The first of the two rows whose scales the lane has.
  DEVICE int scale_row() const { return row_warp_ * kGroup + 16 * t_ + 2 * g_; }

  // The position of the 16 bytes `unit` of a row in a stage. Lanes that read together read four rows, 16
  // apart, in different banks.
  static DEVICE int code_unit(int row, int unit) { return unit ^ row / 16 % 4 * 2; }

  // Columns and tokens past the end are replaced by existing ones; their results are not written.
  DEVICE int existing_column(int column) const { return column < p_.k ? column : 0; }
  DEVICE int existing_token(const RowTile& tokens, int token) const {
    const int end = groups_.end_of(tokens);
    return token < end ? token : end - 1;
  }

  DEVICE void start_loading() {
    fetch(stage_ / steps_);
    start_tile(stage_ % steps_ * kRows);
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) {
      start_stage(stage_ + i, i, scales_[i]);
      if (rows_left_ <= 0) start_next_tile();
    }
  }
  DEVICE void fetch(int tile) {
    tile_ = tile;
    column_ = column_of(tile);
    tokens_ = tokens_of(tile);
    groups_.move_to(tokens_.expert);
  }
  DEVICE void start_tile(int row) {
    const int token = existing_token(tokens_, tokens_.begin + dy_token());
    rows_left_ = p_.n - row;
    tokens_after_ = groups_.end_of(tokens_) - 1 - token;
    codes_at_ = groups_.weight().packed +
                static_cast<uint64_t>(static_cast<uint32_t>(row + code_row())) * row_bytes_ +
                existing_column(column_ + thread_index() % kCodeUnits * 32) / 2;
    dy_at_ = reinterpret_cast<const uint8_t*>(static_cast<const T*>(p_.x) + int64_t{token} * p_.n + row +
                                              dy_row());
    scale_at_ =
        static_cast<uint32_t>(row + scale_row()) * row_scales_ +
        (static_cast<uint32_t>(existing_column(column_ + column_warp_ * kGroup)) >> p_.weight.block_shift);
  }
  DEVICE void start_next_tile() {
    if constexpr (Groups::kIsMany) {
      fetch(tile_ + 1);
    } else {
      tokens_.begin += kTokens;
      if (tokens_.begin >= p_.m) {
        tokens_.begin = 0;
        column_ += kColumns;
      }
    }
    start_tile(0);
  }
  // Starts loading the next stage into a slot; rows past the end are zeros.
  DEVICE void start_stage(int stage, int slot, PackedScale (&scales)[2]) {
    if (stage < end_) {
      copy_codes(stages_[slot]);
      copy_dy(stages_[slot]);
      load_scales(scales);
      rows_left_ -= kRows;
      codes_at_ += kRows * row_bytes_;
      dy_at_ += kRows * sizeof(T);
      scale_at_ += kRows * row_scales_;
    }
    copy_async_commit();
  }
  DEVICE void copy_codes(Stage& stage) const {
    const int unit = thread_index() % kCodeUnits;
#pragma unroll
    for (int i = 0; i < kRows; i += kCodeRows) {
      const int row = code_row() + i;
      const int to = code_unit(code_row(), unit) ^ code_unit(i, 0);  // code_unit(row, unit) without carries
      copy_async_16(&stage.weight[row][to * 16], codes_at_ + uint64_t{row_bytes_} * i, row < rows_left_);
    }
  }
  DEVICE void copy_dy(Stage& stage) const {
    const int dy_bytes = p_.n * static_cast<int>(sizeof(T));
#pragma unroll
    for (int i = 0; i < kTokens; i += kDyTokens) {
      if (kTokens < kDyTokens && dy_token() >= kTokens) break;
      copy_async_16(&stage.dy[dy_token() + i][dy_row()],
                    dy_at_ + int64_t{i < tokens_after_ ? i : tokens_after_} * dy_bytes,
                    dy_row() < rows_left_);
    }
  }
  // Arbitrary scales for rows past the end: they multiply zeros.
  DEVICE void load_scales(PackedScale (&scales)[2]) const {
    const uint32_t at = scale_row() < rows_left_ ? scale_at_ : 0;
    scales[0] = load_scale(groups_.weight(), at);
    scales[1] = load_scale(groups_.weight(), at + row_scales_);
  }
  DEVICE uint32_t next_scales() {
    float scale[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) scale[i] = unpack_scale(scales_[0][i], shared_->map, scale_offset_);
#pragma unroll
    for (int i = 1; i < kStages - 1; ++i) {
      scales_[i - 1][0] = scales_[i][0];
      scales_[i - 1][1] = scales_[i][1];
    }
    return pack2<T>(scale[0], scale[1]);
  }

  // ---- Multiplying ------------------------------------------------------------------------------------

  // As in linear_decode.cuh, the order of rows within a group is free. Lane (g, t) has the four rows from 16t
  // on of each step and the bytes from 4g on of each; columns 8g + 2j and 8g + 2j + 1, of byte j, are
  // features g and g + 8.
  //
  // Steps kBegin .. kEnd - 1: half a stage has half of them.
  template <int kBegin, int kEnd>
  DEVICE void multiply_stage(Sums& sums) {
    copy_async_wait<kStages - 2>();
    __syncthreads();
    const Stage& stage = stages_[slot_];
    const uint32_t packed_scales = next_scales();
    start_stage(stage_ + kStages - 1, slot_ == 0 ? kStages - 1 : slot_ - 1, scales_[kStages - 2]);
    slot_ = slot_ == kStages - 1 ? 0 : slot_ + 1;
    uint32_t scale[8];  // of two rows each
#pragma unroll
    for (int i = 0; i < 8; ++i) scale[i] = shuffle_from_quad(packed_scales, i);

    const int row = row_warp_ * kGroup + 16 * t_;
    const uint8_t* codes = &stage.weight[row][code_unit(row, column_warp_ * 2 + g_ / 4) * 16 + g_ % 4 * 4];
    const T* dy = &stage.dy[g_][row];
    Words4 x[kTokenTiles];
#pragma unroll
    for (int s = kBegin; s < kEnd; ++s) {
      if (s % 2 == 0) {
#pragma unroll
        for (int i = 0; i < kTokenTiles; ++i) {
          x[i] = load(reinterpret_cast<const Words4*>(dy + i * 8 * (kRows + DxShape::kPad) + s * 4));
          if constexpr (kScalesDy) {
#pragma unroll
            for (int j = 0; j < 4; ++j) x[i].v[j] = multiply2<T>(x[i].v[j], scale[2 * s + j]);
          }
        }
      }
      uint32_t weight[kFeatureTiles][4];
      decode_step(codes + s * 4 * (kColumns / 2), weight);
#pragma unroll
      for (int j = 0; j < kFeatureTiles; ++j) {
        if constexpr (!kScalesDy) {
#pragma unroll
          for (int i = 0; i < 4; ++i) weight[j][i] = multiply2<T>(weight[j][i], scale[2 * s + i / 2]);
        }
#pragma unroll
        for (int i = 0; i < kTokenTiles; ++i) {
          const uint32_t b[2] = {x[i].v[s % 2 * 2], x[i].v[s % 2 * 2 + 1]};
          mma<T>(sums.c[j][i], weight[j], b);
        }
      }
    }
  }
  // A stage outside of the main loop.
  template <int kBegin, int kEnd>
  DEVICE void multiply_next(Sums& sums) {
    multiply_stage<kBegin, kEnd>(sums);
    ++stage_;
    if (rows_left_ <= 0) start_next_tile();
  }
  DEVICE void decode_step(const uint8_t* codes, uint32_t (&weight)[kFeatureTiles][4]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto row = reinterpret_cast<const uint32_t*>(codes + half * kColumns);
      const uint32_t low = load(row), high = load(row + kColumns / 8);
      // Codes of both rows side by side, for even and odd columns.
      constexpr uint32_t kUpper = 0xf0f0f0f0u;
      const uint32_t even = select_bits(kUpper, low, high >> 4), odd = select_bits(kUpper, low << 4, high);
#pragma unroll
      for (int j = 0; j < kFeatureTiles; ++j) {
        weight[j][2 * half] = table_.pair(even, j);
        weight[j][2 * half + 1] = table_.pair(odd, j);
      }
    }
  }

  // ---- Reducing and writing ---------------------------------------------------------------------------

  DEVICE void finish(int tile, const RowTile& tokens, Sums& sums) {
    const Sharers sharers(groups_.work(), tile, 2 * steps_);
    const int column = column_of(tile) + column_warp_ * kGroup + 8 * g_;
    if (sharers.is_first()) {
      groups_.template add_delta_dx<T>(
          tokens.expert, row_warp_, kRowWarps, existing_column(column),
          [&](int i) { return existing_token(tokens, tokens.begin + i * 8 + g_); }, sums.c);
    }
    add_row_warps(sums);
    if (!sharers.is_one() && !add_blocks(sharers, sums)) return;
    if (row_warp_ == 0 && column < p_.k) write(column, tokens, sums);
  }

  // Adds the sums of the warps with the same columns into the first of them.
  DEVICE void add_row_warps(Sums& sums) const {
    const int lane = lane_index();
#pragma unroll
    for (int i = 0; i < kTokenTiles; ++i) {
      __syncthreads();  // others may still be reading the previous sums
      if (row_warp_ > 0) {
#pragma unroll
        for (int j = 0; j < kFeatureTiles; ++j) {
          store(&shared_->sum[row_warp_ - 1][column_warp_][j][lane], bit_cast<Four>(sums.c[j][i]));
        }
      }
      __syncthreads();
      if (row_warp_ > 0) continue;
#pragma unroll
      for (int w = 0; w < kRowWarps - 1; ++w) {
#pragma unroll
        for (int j = 0; j < kFeatureTiles; ++j)
          add(load(&shared_->sum[w][column_warp_][j][lane]), sums.c[j][i]);
      }
    }
  }

  DEVICE Four* part_of(const Sharers& sharers, int block) const {
    return reinterpret_cast<Four*>(sharers.partial_of(block, kTokens * kColumns)) +
           column_warp_ * kFeatureTiles * kTokenTiles * kWarp + lane_index();
  }
  // Returns whether this block is the last to arrive at the tile; then `sums` has the total, added in block
  // order.
  DEVICE bool add_blocks(const Sharers& sharers, Sums& sums) const {
    if (row_warp_ == 0) store_part(sums.c, part_of(sharers, block_index()), kWarp, AllTokens{});
    if (!sharers.is_last_block(&shared_->last)) return false;
    if (row_warp_ > 0) return true;
    sums = {};
    for (int block = sharers.first; block <= sharers.last; ++block) {
      add_part(part_of(sharers, block), kWarp, AllTokens{}, sums.c);
    }
    return true;
  }

  // A lane has eight consecutive columns of its tokens.
  DEVICE void write(int column, const RowTile& tokens, const Sums& sums) const {
#pragma unroll
    for (int i = 0; i < kTokenTiles; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int row = tokens.begin + i * 8 + 2 * t_ + e;
        if (row >= groups_.end_of(tokens)) continue;
        Words4 words;
#pragma unroll
        for (int j = 0; j < 4; ++j) words.v[j] = pack2<T>(sums.c[j][i][e], sums.c[j][i][e + 2]);
        store(reinterpret_cast<Words4*>(static_cast<T*>(p_.y) + int64_t{row} * p_.k + column), words);
      }
    }
  }
};

template <class T, class Table, int kTokenTiles>
struct LinearDx : LinearDxOf<T, Table, kTokenTiles, OneWeight> {};
// With the narrow table, which leaves space for tiles of this many tokens.
template <class T, int kTokenTiles>
struct ExpertsDx : LinearDxOf<T, NarrowTable, kTokenTiles, ManyWeights> {};

}  // namespace peft_kernels::cuda
