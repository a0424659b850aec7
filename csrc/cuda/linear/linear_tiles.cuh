// y = x W^T with an NF4 weight for more rows of x ("tokens") than linear_small.cuh handles, where multiplying
// dominates.
//
// Operands are as there. A warp's part of a tile is 32 features by 64 tokens, so it decodes a weight once for
// 64 multiplications. The warps of a block have different features or, where tiles of so many features would
// be too few, half of them have every other group of k. x is loaded through a ring in shared memory and the
// weight through registers, both two stages ahead.
//
// Blocks have equal shares of all tiles' stages of k, and loading continues from tile to tile. Stages come in
// pairs; at the ends of its share a block may multiply only one of them.
#pragma once

#include "linear_groups.cuh"

namespace peft_kernels::cuda {

template <class T, class Table, int kFeatureWarps, class Groups>
struct LinearTilesOf {
  static constexpr TileShape kShape{kFeatureWarps, Table::kIsWide};
  static constexpr int kThreads = TileShape::kWarps * kWarp;
  static constexpr int kBlocksPerSm = 1;
  static constexpr int kRows = kShape.rows(), kTokens = TileShape::kTokens;
  static constexpr int kRowTiles = TileShape::kRowTiles, kTokenTiles = kTokens / 8;
  static constexpr int kLaneRows = 2 * kRowTiles;  // rows of the weight that a lane reads
  static constexpr int kDepthWarps = kShape.depth_warps(), kDepth = kShape.depth();
  static constexpr int kChunkStages = TileShape::kChunkStages;
  static constexpr int kPitch = kDepth + TileShape::kPad;
  static constexpr int kStage = kTokens * kPitch;
  static constexpr int kSharedOffset = kShape.shared_offset();
  static constexpr int kSharing = static_cast<int>(kShape.sharing_stages());
  static constexpr int kAhead = TileShape::kStages - 1;
  static_assert(kAhead == 2 && kChunkStages == 4, "a stage of a chunk has its place in bytes_");

  using Params = typename Groups::Params;  // shares are by stages
  struct Shared {
    alignas(16) T x[TileShape::kStages][kStage];
    float map[nf4::kDynamicCodes];
    alignas(16) uint32_t last;
  };
  static_assert(sizeof(Shared) == kShape.fixed_bytes());
  static_assert(!Table::kIsWide || sizeof(Shared) + kMostReserved <= kWideTableAddress);

  static DEVICE void run(const Params& p) {
    LinearTilesOf self(p);
    if (Groups::kIsMany && self.begin_ >= self.end_) return;
    self.start_loading();
    self.table_ = fill_table<T, Table, kThreads>(p.weight, shared_memory<uint8_t>(), sizeof(Shared));
    fill_map<kThreads>(p.weight, self.shared_->map);
    __syncthreads();
    for (int tile = self.begin_ / self.stages_; tile * self.stages_ < self.end_; ++tile) {
      const Place place = self.place_of(tile);
      Sums sums{};
      const int before = tile * self.stages_, first = before < self.begin_ ? self.begin_ - before : 0;
      const int end = before + self.stages_ < self.end_ ? self.stages_ : self.end_ - before;
      int stage = first / kAhead * kAhead;
      bool skips = stage < first;
      for (; stage + kAhead < end; stage += kChunkStages, skips = false) {
        self.template multiply_chunk<kChunkStages>(place, stage, end, skips, sums);
      }
      if (stage < end) self.template multiply_chunk<kAhead>(place, stage, end, skips, sums);
      self.finish(tile, place, sums);
    }
  }

 private:
  static constexpr int kFeatureLanes = kFeatureWarps * kWarp;
  static_assert(kDepthWarps == 1 || kStage * sizeof(T) >= kTokenTiles * kFeatureLanes * sizeof(Four));

  struct Sums {
    float c[kRowTiles][kTokenTiles][4];
  };
  // A warp's part of a tile.
  struct Place {
    int row, token;  // first ones; a lane has the four rows from row + 4g on
    int end;         // of tokens, or more
    int expert;
    bool any;  // rows

    DEVICE int tokens() const { return end - token; }  // or more
  };

  const Params& p_;
  const int feature_warp_, depth_warp_, g_, t_;
  const int stages_;  // of a tile
  Groups groups_;
  const int begin_, end_;  // the block's share of all tiles' stages
  Shared* const shared_;
  const uint32_t row_scales_;
  float scale_offset_;
  Table table_{};

  // In the ring: the next stage to multiply, and the free one.
  int stage_ = 0, free_ = kAhead * kStage;

  // The chunk being loaded.
  int next_tile_, next_stage_;  // start
  int next_k_;                  // k left in it, or more
  static constexpr int kUnit = 16 / sizeof(T), kRowUnits = kDepth / kUnit;
  static constexpr int kCopiedRows = kThreads / kRowUnits, kCopies = kTokens / kCopiedRows;
  const T* x_from_;
  int next_tokens_;  // left from the thread's first one on
  const uint8_t* bytes_at_[kLaneRows];
  uint32_t rows_[kLaneRows];
  Words2 bytes_[kAhead][kLaneRows]{};
  PackedScale scales_[kLaneRows];
  float scale_[kLaneRows];  // of the chunk being multiplied

  DEVICE explicit LinearTilesOf(const Params& p) : LinearTilesOf(p, warp_index()) {}
  DEVICE LinearTilesOf(const Params& p, int warp)
      : p_(p),
        feature_warp_(warp % kFeatureWarps),
        depth_warp_(warp / kFeatureWarps),
        g_(lane_index() / 4),
        t_(lane_index() % 4),
        stages_((p.k + kDepth - 1) / kDepth),
        groups_(p, kTokens, (p.n + kRows - 1) / kRows, stages_, kSharing),
        begin_(groups_.work().begin()),
        end_(groups_.work().end()),
        shared_(reinterpret_cast<Shared*>(shared_memory<uint8_t>() + kSharedOffset)),
        row_scales_(static_cast<uint32_t>(p.k >> p.weight.block_shift)),
        scale_offset_(load_scale_offset(p.weight)) {}

  // Neighbouring tiles share rows of the weight.
  DEVICE Place place_of(int tile) const {
    const int row = tile / groups_.token_tiles * kRows + feature_warp_ * (16 * kRowTiles);
    const RowTile rows = groups_.rows(tile % groups_.token_tiles, kTokens);
    return {row, rows.begin, groups_.end_of(rows), rows.expert, row < p_.n};
  }
  // Tokens and rows past the end repeat the last one; their results are not written.
  DEVICE int token_at(const Place& place, int token) const {
    return token < place.end ? token : place.end - 1;
  }
  DEVICE int row_of(const Place& place, int i) const {
    const int row = place.row + 4 * g_ + i;
    return row < p_.n ? row : p_.n - 1;
  }
  // The start of the warp's group of a stage in a chunk.
  DEVICE int group_begin(int stage) const { return stage * kDepth + depth_warp_ * kGroup; }

  // ---- Loading ----------------------------------------------------------------------------------------

  DEVICE void start_loading() {
    start_tile(begin_ / stages_, begin_ % stages_ / kAhead * kAhead);
#pragma unroll
    for (int stage = 0; stage < kAhead; ++stage) {
      copy_x(stage, stage * kStage);
      load_bytes(stage);
    }
  }
  DEVICE void start_tile(int tile, int stage) {
    next_tile_ = tile;
    next_stage_ = stage;
    const Place place = place_of(tile);
    const int token = place.token + thread_index() / kRowUnits;
    x_from_ = static_cast<const T*>(p_.x) + int64_t{token} * p_.k + stage * kDepth +
              thread_index() % kRowUnits * kUnit;
    next_tokens_ = place.end - token;
    groups_.move_to(place.expert);
    // The chunk being multiplied has its scales unpacked already.
    if constexpr (Groups::kIsMany) scale_offset_ = groups_.scale_offset(place.expert);
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
      rows_[i] = static_cast<uint32_t>(row_of(place, i));
      bytes_at_[i] = groups_.weight().packed + uint64_t{rows_[i]} * static_cast<uint32_t>(p_.k / 2) +
                     (stage * kDepth + depth_warp_ * kGroup) / 2 + 8 * t_;
    }
    start_chunk();
  }
  // kStages: the stages of the previous chunk.
  template <int kStages>
  DEVICE void advance() {
    next_stage_ += kStages;
    if (next_stage_ >= stages_) return start_tile(next_tile_ + 1, 0);
    x_from_ += kStages * kDepth;
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) bytes_at_[i] += kStages * kDepth / 2;
    start_chunk();
  }
  // Lane (g, t) has the scales of its rows' groups in stage t; arbitrary ones past the end.
  DEVICE void start_chunk() {
    const int begin = next_stage_ * kDepth, k = begin + group_begin(t_);
    next_k_ = next_tile_ * stages_ + next_stage_ < end_ ? p_.k - begin : 0;
    const uint32_t block = static_cast<uint32_t>(k < p_.k ? k : 0) >> p_.weight.block_shift;
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i)
      scales_[i] = load_scale(groups_.weight(), rows_[i] * row_scales_ + block);
  }
  DEVICE void copy_x(int stage, int to) const {
    if (stage * kDepth + thread_index() % kRowUnits * kUnit < next_k_) {
      T* first =
          shared_->x[0] + to + thread_index() / kRowUnits * kPitch + thread_index() % kRowUnits * kUnit;
#pragma unroll
      for (int i = 0; i < kCopies; ++i) {
        if (i * kCopiedRows < next_tokens_) {
          copy_async_16(first + i * kCopiedRows * kPitch,
                        x_from_ + stage * kDepth + int64_t{i * kCopiedRows} * p_.k);
        }
      }
    }
    copy_async_commit();
  }
  DEVICE void load_bytes(int stage) {
    if (group_begin(stage) >= next_k_) return;
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
      bytes_[stage % kAhead][i] =
          load_once(reinterpret_cast<const Words2*>(bytes_at_[i] + stage * kDepth / 2));
    }
  }

  DEVICE void unpack_scales() {
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) scale_[i] = unpack_scale(scales_[i], shared_->map, scale_offset_);
  }

  // ---- Multiplying ------------------------------------------------------------------------------------

  // Stages from `first` on of a tile, up to its last; stages outside of the block's share are skipped.
  template <int kStages>
  DEVICE void multiply_chunk(const Place& place, int first, int end, bool skips_first, Sums& sums) {
    const int own = end < stages_ ? end * kDepth : p_.k;
    const int k = place.any ? own - first * kDepth : 0;
#pragma unroll
    for (int stage = 0; stage < kStages; ++stage) {
      uint32_t weight[kRowTiles][4][4];
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        const Words2(&bytes)[kLaneRows] = bytes_[stage % kAhead];
        decode_group(table_, bytes[2 * r], bytes[2 * r + 1], weight[r]);
      }
      if (stage == 0) unpack_scales();
      if (stage == kStages - kAhead) advance<kStages>();
      const int next = (stage + kAhead) % kStages;
      load_bytes(next);
      copy_async_wait<kAhead - 1>();
      __syncthreads();  // the stage has arrived, and no thread reads the previous one any more
      copy_x(next, free_);
      if (group_begin(stage) < k && (stage > 0 || !skips_first)) {
        multiply_stage(weight, stage, place.tokens(), sums);
      }
      free_ = stage_;
      stage_ = stage_ == kAhead * kStage ? 0 : stage_ + kStage;
    }
  }

  DEVICE void multiply_stage(const uint32_t (&weight)[kRowTiles][4][4], int stage, int tokens, Sums& sums) {
    float scale[kLaneRows];
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) scale[i] = __shfl_sync(kAllLanes, scale_[i], stage, 4);
    const T* x_at = shared_->x[0] + stage_ + g_ * kPitch + depth_warp_ * kGroup + 16 * t_;
    // Token tiles at a time: as few as keep the matrix units busy, to save registers.
    constexpr int kAtOnce = 2;
    GroupOfX x[kTokenTiles];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) x[i] = load_group_of_x(x_at + i * 8 * kPitch);
#pragma unroll
    for (int first = 0; first < kTokenTiles; first += kAtOnce) {
      if (first > 0 && first * 8 >= tokens) break;
#pragma unroll
      for (int i = first + kAtOnce; i < first + 2 * kAtOnce && i < kTokenTiles; ++i) {
        x[i] = load_group_of_x(x_at + i * 8 * kPitch);
      }
#pragma unroll
      for (int i = first; i < first + kAtOnce; ++i) {
#pragma unroll
        for (int r = 0; r < kRowTiles; ++r) {
          multiply_group<T>(weight[r], x[i], scale[2 * r], scale[2 * r + 1], sums.c[r][i]);
        }
      }
    }
  }

  // ---- Reducing and writing ---------------------------------------------------------------------------

  // Token tiles are dealt to the warps that share features.
  DEVICE bool finishes(int token_tile, int tokens) const {
    return token_tile % kDepthWarps == depth_warp_ && token_tile * 8 < tokens;
  }
  DEVICE int feature_lane() const { return feature_warp_ * kWarp + lane_index(); }

  DEVICE void finish(int tile, const Place& place, Sums& sums) {
    remove_code_factor<T>(sums.c);
    const Sharers sharers(groups_.work(), tile, stages_);
    if (sharers.is_first()) {
      groups_.template add_delta<T>(
          place.expert, depth_warp_, kDepthWarps, [&](int i) { return row_of(place, i); },
          [&](int i) { return token_at(place, place.token + i * 8 + g_); }, sums.c);
    }
    if constexpr (kDepthWarps > 1) add_depth_warps(sums);
    if (!sharers.is_one()) {
      const auto has = [&](int i) { return finishes(i, place.tokens()); };
      store_part(sums.c, part_of(sharers, block_index()), kFeatureLanes, has);
      if (!sharers.is_last_block(&shared_->last)) return;
      sums = {};
      for (int block = sharers.first; block <= sharers.last; ++block) {
        add_part(part_of(sharers, block), kFeatureLanes, has, sums.c);
      }
    }
    write(place, sums);
  }

  // Uses the stage that is free until the next barrier.
  DEVICE void add_depth_warps(Sums& sums) const {
    static_assert(kDepthWarps <= 2);
    Four* others = reinterpret_cast<Four*>(shared_->x[0] + free_) + feature_lane();
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kTokenTiles; ++i) {
        if (i % kDepthWarps != depth_warp_) store(others + i * kFeatureLanes, bit_cast<Four>(sums.c[r][i]));
      }
      __syncthreads();
#pragma unroll
      for (int i = 0; i < kTokenTiles; ++i) {
        if (i % kDepthWarps == depth_warp_) add(load(others + i * kFeatureLanes), sums.c[r][i]);
      }
    }
  }

  DEVICE Four* part_of(const Sharers& sharers, int block) const {
    return reinterpret_cast<Four*>(sharers.partial_of(block, kRows * kTokens)) + feature_lane();
  }
  DEVICE void write(const Place& place, const Sums& sums) const {
    const int row = place.row + 4 * g_;
    if (row >= p_.n) return;
    float bias[kLaneRows] = {};
    if (p_.bias) {
#pragma unroll
      for (int i = 0; i < kLaneRows; ++i)
        bias[i] = load_as_float(p_.bias, p_.bias_dtype, groups_.bias_row(place.expert, row_of(place, i)));
    }
#pragma unroll
    for (int i = 0; i < kTokenTiles; ++i) {
      if (!finishes(i, place.tokens())) continue;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int token = i * 8 + 2 * t_ + e;
        if (token >= place.tokens()) continue;
        float y[kLaneRows];
#pragma unroll
        for (int j = 0; j < kLaneRows; ++j) y[j] = sums.c[j / 2][i][j % 2 * 2 + e] + bias[j];
        T* to = static_cast<T*>(p_.y) + int64_t{place.token + token} * p_.n + row;
        if (p_.n % kLaneRows == 0) {
          store(reinterpret_cast<Words2*>(to), {pack2<T>(y[0], y[1]), pack2<T>(y[2], y[3])});
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

template <class T, class Table, int kFeatureWarps>
struct LinearTiles : LinearTilesOf<T, Table, kFeatureWarps, OneWeight> {};
template <class T, class Table>
struct ExpertsTiles : LinearTilesOf<T, Table, TileShape::kWarps, ManyWeights> {};

}  // namespace peft_kernels::cuda
