// y = x W^T with an NF4 weight for few rows of x ("tokens"), where reading the weight dominates.
//
// The weight is the first operand of the matrix instruction, 16 of its rows ("features") by 16 of k, and x^T
// the second, 8 tokens wide: 1 token costs as much as 8. A block keeps a slice of x, all tokens by part of k,
// in shared memory.
//
// Warps have equal shares of the slice's groups of all tiles, tile after tile, and do not synchronise until
// the end. Then the warps of a block add their partial sums of the same tile, and then the blocks theirs, all
// in the order of the shares.
#pragma once

#include "linear_scales.cuh"
#include "linear_shared.cuh"
#include "linear_slab.cuh"

namespace peft_kernels::cuda {

template <class T, class Table, class Scales, int kTokenTiles, int kRowTiles>
struct LinearSmall {
  static constexpr SmallShape kShape{kTokenTiles, kRowTiles, Table::kIsWide};
  static constexpr int kThreads = SmallShape::kWarps * kWarp;
  static constexpr int kBlocksPerSm = 1;
  static constexpr int kWarps = SmallShape::kWarps;
  static constexpr int kRows = kShape.rows(), kTokens = kShape.tokens();
  static constexpr int kGroups = kShape.groups();  // of a chunk
  static constexpr int kQuads = kGroups / 4;
  static constexpr int kLaneRows = 2 * kRowTiles;  // rows of the weight that a lane reads

  // Whether a full chunk is multiplied as one basic block, without checking the number of groups: hides
  // latency better, but needs too many registers for many sums.
  static constexpr bool kUnrolls = kTokenTiles < 4;

  struct Params : LinearParams {
    SliceParams work;
    int shared_offset, x_offset;  // where in shared memory Shared and the slice of x are
  };
  struct Shared {
    typename Scales::Map map[nf4::kDynamicCodes];
    uint32_t is_last[kThreads];  // of tiles
    alignas(16)
        Four begun[kWarps][kRowTiles * kTokenTiles][kWarp];  // partial sums of tiles begun by earlier warps
  };
  static_assert(sizeof(Shared) == kShape.fixed_bytes());

  static DEVICE void run(const Params& p) {
    LinearSmall self(p);
    self.copy_x();
    self.start_loading();
    self.table_ = fill_table<T, Table, kThreads>(p.weight, self.start_,
                                                 p.x_offset == 0 ? self.x_bytes() : sizeof(Shared),
                                                 Scales::template code_factor<T>());
    self.scales_of_.template fill<kThreads>(self.shared_->map);
    copy_async_wait<0>();
    __syncthreads();
    self.multiply();
    self.finish();
  }

 private:
  using Sums = float[kRowTiles][kTokenTiles][4];

  const Params& p_;
  const int warp_, g_, t_;
  const SliceOfWork slice_;
  uint8_t* const start_;
  Shared* const shared_;
  const T* const x_at_;
  const Scales scales_of_;
  Table table_{};

  const uint32_t row_bytes_;
  const uint8_t* const first_bytes_;  // of row 0
  const int first_scale_k_, last_row_;

  // The warp's share of units (groups, tile after tile).
  const int begin_, end_;
  int tile_;
  Sums sums_{};  // of the current tile; finally of the last one

  // The chunk being loaded.
  int next_row_;     // the lane's first
  int next_groups_;  // left in the tile
  int next_left_;    // left in the share after these
  const uint8_t* bytes_at_[kLaneRows];
  uint32_t rows_[kLaneRows];
  int scale_k_;  // k of the first group whose scales the lane has
  Words2 bytes_[kGroups][kLaneRows]{};
  typename Scales::Packed scales_[kQuads][kLaneRows];

  DEVICE explicit LinearSmall(const Params& p)
      : p_(p),
        warp_(warp_index()),
        g_(lane_index() / 4),
        t_(lane_index() % 4),
        slice_(p.work),
        start_(shared_memory<uint8_t>()),
        shared_(reinterpret_cast<Shared*>(start_ + p.shared_offset)),
        x_at_(x_row(kTokenTiles == 1 ? token_of(0) : g_) + 16 * t_),
        scales_of_(p.weight, p.k, t_),
        row_bytes_(static_cast<uint32_t>(p.k / 2)),
        first_bytes_(p.weight.packed + slice_.begin * (kGroup / 2) + 8 * t_),
        first_scale_k_((slice_.begin + t_) * kGroup),
        last_row_(p.n - 1),
        begin_(slice_.share_begin(warp_)),
        end_(slice_.share_begin(warp_ + 1)),
        tile_(begin_ / slice_.groups),
        next_row_(tile_ * kRows + kLaneRows * g_),
        next_left_(end_ - begin_) {}

  DEVICE int x_pitch() const { return p_.work.most_groups() * kGroup + SmallShape::kPad; }
  DEVICE uint32_t x_bytes() const {
    return static_cast<uint32_t>((kTokenTiles == 1 ? p_.m : kTokens) * x_pitch()) * sizeof(T);
  }
  DEVICE T* x_row(int token) const { return reinterpret_cast<T*>(start_ + p_.x_offset) + token * x_pitch(); }
  // Tokens past the end repeat the last one; their results are not written.
  DEVICE int token_of(int tile) const {
    const int token = tile * 8 + g_;
    return token < p_.m ? token : p_.m - 1;
  }
  // Rows of a tile past the end, likewise.
  DEVICE int row_of(int tile, int i) const {
    const int row = tile * kRows + kLaneRows * g_ + i;
    return row < p_.n ? row : p_.n - 1;
  }

  DEVICE void copy_x() const {
    constexpr int kUnit = 16 / sizeof(T);
    const int units = slice_.groups * kGroup / kUnit;
    for (int row = 0, unit = thread_index();; unit += kThreads) {
      for (; unit >= units; unit -= units) ++row;
      if (row >= p_.m) break;
      copy_async_16(x_row(row) + unit * kUnit,
                    static_cast<const T*>(p_.x) + int64_t{row} * p_.k + slice_.begin * kGroup + unit * kUnit);
    }
    copy_async_commit();
  }

  // ---- Loading the weight -----------------------------------------------------------------------------

  DEVICE void start_loading() {
    start_tile(begin_ % slice_.groups);
    load_scales();
#pragma unroll
    for (int j = 0; j < kGroups; ++j) load_group(j);
  }
  // Starts the tile at `group`.
  DEVICE void start_tile(int group) {
    const int groups = slice_.groups - group;
    next_groups_ = groups < next_left_ ? groups : next_left_;
    next_left_ -= next_groups_;
    scale_k_ = first_scale_k_ + group * kGroup;
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
      rows_[i] = static_cast<uint32_t>(next_row_ + i < last_row_ ? next_row_ + i : last_row_);
      bytes_at_[i] = first_bytes_ + uint64_t{rows_[i]} * row_bytes_ + group * (kGroup / 2);
    }
  }
  DEVICE void advance() {
    if (next_groups_ <= kGroups) {
      next_row_ += kRows;
      return start_tile(0);
    }
    next_groups_ -= kGroups;
    scale_k_ += kGroups * kGroup;
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) bytes_at_[i] += kGroups * kGroup / 2;
  }
  // Lane (g, t) has the scales of its rows' groups t of each quad; arbitrary ones past the end.
  DEVICE void load_scales() {
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      const uint32_t place = scales_of_.place_of(scale_k_ + q * 4 * kGroup);
#pragma unroll
      for (int i = 0; i < kLaneRows; ++i) scales_[q][i] = scales_of_.load_at(rows_[i], place);
    }
  }
  DEVICE void load_group(int j) {
    if (j >= next_groups_) return;
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
      bytes_[j][i] = load_once(reinterpret_cast<const Words2*>(bytes_at_[i] + j * (kGroup / 2)));
    }
  }

  // ---- Multiplying ------------------------------------------------------------------------------------

  // Multiplies the whole share. The sums of its last tile stay in sums_.
  DEVICE void multiply() {
    int group = begin_ % slice_.groups;
    for (int left = end_ - begin_; left > 0; ++tile_, group = 0) {
      const int groups = slice_.groups - group < left ? slice_.groups - group : left;
      const T* x = x_at_ + group * kGroup;
      clear(sums_);
      for (int rest = groups; rest > 0; rest -= kGroups, x += kGroups * kGroup) {
        if (kUnrolls && rest >= kGroups) {
          multiply_chunk<true>(x, kGroups);
        } else {
          multiply_chunk<false>(x, rest);
        }
      }
      left -= groups;
      multiply_sums(sums_, scales_of_.template sum_factor<T>());
      if (slice_.index == 0 && group == 0) {
        multiply_slab(
            p_, 0, 1, [&](int i) { return row_of(tile_, i); }, [&](int i) { return token_of(i); }, sums_);
      }
      if (group > 0) {
        store_part(sums_, &shared_->begun[warp_][0][lane_index()], kWarp, AllTokens{});
      } else if (left > 0) {
        write_part(tile_, sums_);
      }
    }
    --tile_;
  }
  static DEVICE void clear(Sums& sums) {
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
#pragma unroll
      for (int i = 0; i < kTokenTiles; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) sums[r][i][e] = 0.0f;
      }
    }
  }

  template <bool kWhole>
  DEVICE void multiply_chunk(const T* x, int groups) {
    typename Scales::Value scale[kQuads][kLaneRows];
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
#pragma unroll
      for (int i = 0; i < kLaneRows; ++i) {
        scale[q][i] = scales_of_.unpack(scales_[q][i], shared_->map);
      }
    }
    advance();
    load_scales();
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      if (kWhole || j == 0 || j < groups) multiply_group_of(x, j, scale[j / 4]);
      load_group(j);
    }
  }

  DEVICE void multiply_group_of(const T* x_of_chunk, int j,
                                const typename Scales::Value (&scale)[kLaneRows]) {
    uint32_t weight[kRowTiles][4][4];
    typename Scales::Value row_scale[kLaneRows];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      decode_group(table_, bytes_[j][2 * r], bytes_[j][2 * r + 1], weight[r]);
    }
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) row_scale[i] = __shfl_sync(kAllLanes, scale[i], j % 4, 4);
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      scales_of_.apply(shared_->map, row_scale[2 * r], row_scale[2 * r + 1], weight[r]);
    }
#pragma unroll
    for (int i = 0; i < kTokenTiles; ++i) {
      const GroupOfX x = load_group_of_x(x_of_chunk + i * 8 * x_pitch() + j * kGroup);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        scales_of_.template multiply<T>(weight[r], x, row_scale[2 * r], row_scale[2 * r + 1], sums_[r][i]);
      }
    }
  }

  // ---- Reducing and writing ---------------------------------------------------------------------------

  DEVICE void finish() {
    __syncthreads();  // sums of tiles that other warps began and this one ends
    add_begun();
    if (!p_.work.shares_tiles) return;
    __syncthreads();
    const int begin = slice_.share_begin(0), end = slice_.share_begin(kWarps);
    if (begin >= end) return;
    const int last = (end - 1) / slice_.groups;
    for (int tile = begin / slice_.groups; tile <= last; tile += kThreads) add_blocks(tile, last);
  }

  // The warp that has the first part of a tile in a block adds the others.
  DEVICE void add_begun() {
    if (begin_ >= end_) return;
    const int first = begin_ / slice_.groups;
    const bool begins_in_tile = begin_ % slice_.groups != 0;
    if (warp_ == 0 && begins_in_tile) {
      Sums sums{};
      add_rest(first, 0, sums);
      store_part(sums, part_of(slice_.part(first)), kWarp, AllTokens{});  // an earlier block has another part
    }
    if (!begins_in_tile || tile_ != first) {
      add_rest(tile_, 1, sums_);
      write_part(tile_, sums_);
    }
  }
  DEVICE void add_rest(int tile, int from_warp, Sums& sums) const {
    for (int w = warp_ + from_warp; w < kWarps; ++w) {
      const int begin = slice_.share_begin(w);
      if (begin >= (tile + 1) * slice_.groups || begin == slice_.share_begin(w + 1)) break;
      add_part(&shared_->begun[w][0][lane_index()], kWarp, AllTokens{}, sums);
    }
  }

  // Writes y if this block has all of the tile, else stores its partial sums.
  DEVICE void write_part(int tile, const Sums& sums) const {
    if (slice_.parts_of(tile) == 1) return write(tile, sums);
    store_part(sums, part_of(slice_.part(tile)), kWarp, AllTokens{});
  }
  DEVICE Four* part_of(int64_t part) const {
    return reinterpret_cast<Four*>(p_.work.partial + part * (kRows * kTokens)) + lane_index();
  }

  // For a tile per thread, from `first` on: those for which this is the last block to arrive are reduced and
  // written, by a warp each.
  DEVICE void add_blocks(int first, int last) {
    const int mine = first + thread_index();
    bool is_last = false;
    if (mine <= last) {
      const auto parts = static_cast<uint32_t>(slice_.parts_of(mine));
      if (parts > 1) {
        is_last = atomic_add_ordered(p_.work.counter + mine, 1) + 1 == parts;
        if (is_last) store(p_.work.counter + mine, 0u);
      }
    }
    __syncthreads();  // the flags of the previous tiles have been read
    store(&shared_->is_last[thread_index()], uint32_t{is_last});
    __syncthreads();
    for (int i = warp_; i < kThreads && first + i <= last; i += kWarps) {
      if (load(&shared_->is_last[i]) == 0) continue;
      Sums sums{};
      slice_.for_each_part(first + i,
                           [&](int64_t part) { add_part(part_of(part), kWarp, AllTokens{}, sums); });
      write(first + i, sums);
    }
  }

  // A lane has kLaneRows consecutive features of its tokens.
  DEVICE void write(int tile, const Sums& sums) const {
    const int row = tile * kRows + kLaneRows * g_;
    if (row >= p_.n) return;
    float bias[kLaneRows] = {};
    if (p_.bias) {
#pragma unroll
      for (int i = 0; i < kLaneRows; ++i) bias[i] = load_as_float(p_.bias, p_.bias_dtype, row_of(tile, i));
    }
#pragma unroll
    for (int i = 0; i < kTokenTiles; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int token = i * 8 + 2 * t_ + e;
        if (token >= p_.m) continue;
        uint32_t pairs[kRowTiles];
        float y[kLaneRows];
#pragma unroll
        for (int j = 0; j < kLaneRows; ++j) y[j] = sums[j / 2][i][j % 2 * 2 + e] + bias[j];
        T* to = static_cast<T*>(p_.y) + int64_t{token} * p_.n + row;
        if (p_.n % kLaneRows == 0) {
#pragma unroll
          for (int r = 0; r < kRowTiles; ++r) pairs[r] = pack2<T>(y[2 * r], y[2 * r + 1]);
          store(reinterpret_cast<Vec<uint32_t, kRowTiles>*>(to), bit_cast<Vec<uint32_t, kRowTiles>>(pairs));
        } else {
#pragma unroll
          for (int j = 0; j < kLaneRows; ++j) {
            if (row + j < p_.n) store(to + j, from_float<T>(y[j]));
          }
        }
      }
    }
  }
};

}  // namespace peft_kernels::cuda
