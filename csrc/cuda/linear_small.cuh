// Products with an NF4 weight for few rows of x ("tokens"), where reading the weight is what takes the time.
//
// The weight is the matrix instruction's first operand, 16 of its rows ("features") by 16 of k, and x^T the
// second, 8 tokens wide: 1 token costs what 8 do. A block keeps a slice of x, all tokens by part of k, in
// shared memory, and passes through tiles of the weight with it. Its warps share the k of a tile, chunk by
// chunk, and add up in shared memory.
#pragma once

#include "linear_shared.cuh"

namespace peft_kernels::cuda {

template <class T, class Table, int kTokenTiles, int kRowTiles>
struct LinearSmall {
  static constexpr SmallShape kShape{kTokenTiles, kRowTiles, Table::kIsWide};
  static constexpr int kThreads = SmallShape::kWarps * kWarp;
  static constexpr int kBlocksPerSm = 1;
  static constexpr int kWarps = SmallShape::kWarps;
  static constexpr int kRows = kShape.rows(), kTokens = kShape.tokens();
  static constexpr int kGroups = kShape.groups(), kChunk = kShape.chunk();
  static constexpr int kQuads = kGroups / 4;
  static constexpr int kLaneRows = 2 * kRowTiles;  // of the weight, that a lane reads

  // Whether groups beyond k are skipped. If not, they meet zeros of x, and all groups of a chunk are one
  // basic block: that hides latencies better, but registers would not do for many sums.
  static constexpr bool kSkips = kTokenTiles == 4;

  struct Params : LinearParams {
    SplitParams split;
    int slice_chunks;             // of each of the slices into which `split` cuts k
    int shared_offset, x_offset;  // where in shared memory Shared and the slice of x are
  };
  struct Shared {
    float map[nf4::kDynamicCodes];
    alignas(16) uint32_t last;
    alignas(16) float sum[kWarps][kTokens][SmallShape::kSumPitch];  // of one row tile
  };
  static_assert(sizeof(Shared) == kShape.fixed_bytes());

  static DEVICE void run(const Params& p) {
    LinearSmall self(p);
    self.copy_x();
    self.start_loading();
    self.table_ = fill_table<T, Table, kThreads>(self.start_);
    fill_map<kThreads>(p.weight, self.shared_->map);
    copy_async_wait<0>();
    sync_threads();
    for (int tile = self.first_tile_; tile < self.tiles_; tile += self.tile_stride_) {
      Sums sums{};
      for (int chunk = self.warp_; chunk < self.chunks_; chunk += kWarps) self.multiply_chunk(chunk, sums);
      self.finish(tile, sums);
    }
  }

 private:
  struct Sums {
    float c[kRowTiles][kTokenTiles][4];
  };

  const Params& p_;
  const int warp_, g_, t_;
  const int slice_;
  const int tiles_, tile_stride_, first_tile_;
  uint8_t* const start_;
  Shared* const shared_;
  const T* const x_at_;
  const float scale_offset_;
  int chunks_;  // of the slice
  Table table_{};

  const uint32_t row_bytes_, row_scales_;
  const uint8_t* const first_bytes_;  // of row 0

  // The chunk that is on its way.
  int next_tile_, next_chunk_;
  int next_groups_;  // that it has, or more
  const uint8_t* bytes_at_[kLaneRows];
  uint32_t scales_at_[kLaneRows];
  Words2 bytes_[kGroups][kLaneRows];
  PackedScale scales_[kQuads][kLaneRows];

  DEVICE explicit LinearSmall(const Params& p)
      : p_(p),
        warp_(warp_index()),
        g_(lane_index() / 4),
        t_(lane_index() % 4),
        slice_(block_index() % p.split.splits),
        tiles_((p.n + kRows - 1) / kRows),
        tile_stride_(grid_size() / p.split.splits),
        first_tile_(block_index() / p.split.splits),
        start_(shared_memory<uint8_t>()),
        shared_(reinterpret_cast<Shared*>(start_ + p.shared_offset)),
        x_at_(x_row(kTokenTiles == 1 ? token_of(0) : g_) + 16 * t_),
        scale_offset_(load_scale_offset(p.weight)),
        row_bytes_(static_cast<uint32_t>(p.k / 2)),
        row_scales_(static_cast<uint32_t>(p.k >> p.weight.block_shift)),
        first_bytes_(p.weight.packed + (slice_begin() + warp_ * kChunk) / 2 + 8 * t_) {
    const int chunks = (p.k - slice_begin() + kChunk - 1) / kChunk;
    chunks_ = chunks < p.slice_chunks ? chunks : p.slice_chunks;
  }

  DEVICE int slice_begin() const { return slice_ * p_.slice_chunks * kChunk; }
  DEVICE int x_pitch() const { return p_.slice_chunks * kChunk + SmallShape::kPad; }
  DEVICE T* x_row(int token) const { return reinterpret_cast<T*>(start_ + p_.x_offset) + token * x_pitch(); }
  // Tokens beyond the last compute what nobody reads.
  DEVICE int token_of(int tile) const {
    const int token = tile * 8 + g_;
    return token < p_.m ? token : p_.m - 1;
  }
  // Of a lane's rows in a tile, those beyond the last one likewise.
  DEVICE int row_of(int tile, int i) const {
    const int row = tile * kRows + i * 8 + g_;
    return row < p_.n ? row : p_.n - 1;
  }

  // The slice, zeros beyond k.
  DEVICE void copy_x() const {
    constexpr int kUnit = 16 / sizeof(T);
    const int units = chunks_ * kChunk / kUnit;
    const int begin = slice_begin();
    for (int row = 0, unit = thread_index();; unit += kThreads) {
      for (; unit >= units; unit -= units) ++row;
      if (row >= p_.m) break;
      const int col = begin + unit * kUnit;
      const bool valid = col < p_.k;
      copy_async_16(x_row(row) + unit * kUnit,
                    static_cast<const T*>(p_.x) + (valid ? int64_t{row} * p_.k + col : 0), valid);
    }
    copy_async_commit();
  }

  // ---- The weight's way here

  DEVICE void start_loading() {
    next_chunk_ = warp_;
    start_tile(first_tile_);
    load_scales();
#pragma unroll
    for (int j = 0; j < kGroups; ++j) load_group(j);
  }
  DEVICE void start_tile(int tile) {
    next_tile_ = tile;
    next_chunk_ = warp_;
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
      const auto row = static_cast<uint32_t>(row_of(tile, i));
      bytes_at_[i] = first_bytes_ + uint64_t{row} * row_bytes_;
      scales_at_[i] = row * row_scales_;
    }
    count_groups();
  }
  DEVICE void advance() {
    next_chunk_ += kWarps;
    if (next_chunk_ >= chunks_) return start_tile(next_tile_ + tile_stride_);
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) bytes_at_[i] += kWarps * kChunk / 2;
    count_groups();
  }
  DEVICE void count_groups() {
    const bool any = next_tile_ < tiles_ && next_chunk_ < chunks_;
    next_groups_ = any ? (p_.k - slice_begin()) / kGroup - next_chunk_ * kGroups : 0;
  }
  // Lane (g, t) has the scales of its rows' groups t of each quad; any scales for what is not there.
  DEVICE void load_scales() {
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
      const int k = slice_begin() + next_chunk_ * kChunk + (q * 4 + t_) * kGroup;
      const uint32_t block = static_cast<uint32_t>(k < p_.k ? k : 0) >> p_.weight.block_shift;
#pragma unroll
      for (int i = 0; i < kLaneRows; ++i) scales_[q][i] = load_scale(p_.weight, scales_at_[i] + block);
    }
  }
  // Where there is no group the old bytes stay: they meet zeros of x.
  DEVICE void load_group(int j) {
    if (j >= next_groups_) return;
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) {
      bytes_[j][i] = load_once(reinterpret_cast<const Words2*>(bytes_at_[i] + j * (kGroup / 2)));
    }
  }

  // ---- The products

  DEVICE void multiply_chunk(int chunk, Sums& sums) {
    float scale[kQuads][kLaneRows];
#pragma unroll
    for (int q = 0; q < kQuads; ++q) {
#pragma unroll
      for (int i = 0; i < kLaneRows; ++i) {
        scale[q][i] = unpack_scale(scales_[q][i], shared_->map, scale_offset_);
      }
    }
    advance();
    load_scales();
    const int groups = (p_.k - slice_begin()) / kGroup - chunk * kGroups;
#pragma unroll
    for (int j = 0; j < kGroups; ++j) {
      if (!kSkips || j < groups) multiply_group_of(chunk, j, scale[j / 4], sums);
      load_group(j);
    }
  }

  DEVICE void multiply_group_of(int chunk, int j, const float (&scale)[kLaneRows], Sums& sums) {
    uint32_t weight[kRowTiles][4][4];
    float row_scale[kLaneRows];
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      decode_group(table_, bytes_[j][2 * r], bytes_[j][2 * r + 1], weight[r]);
    }
#pragma unroll
    for (int i = 0; i < kLaneRows; ++i) row_scale[i] = shuffle_in_quad(scale[i], j % 4);
#pragma unroll
    for (int i = 0; i < kTokenTiles; ++i) {
      const GroupOfX x = load_group_of_x(x_at_ + chunk * kChunk + i * 8 * x_pitch() + j * kGroup);
#pragma unroll
      for (int r = 0; r < kRowTiles; ++r) {
        multiply_group<T>(weight[r], x, row_scale[2 * r], row_scale[2 * r + 1], sums.c[r][i]);
      }
    }
  }

  DEVICE void write(int row, int token, float sum) const {
    if (row >= p_.n) return;
    if (p_.bias) sum += load_as_float(p_.bias, p_.bias_dtype, row);
    store(static_cast<T*>(p_.y) + int64_t{token} * p_.n + row, from_float<T>(sum));
  }

  DEVICE void finish(int tile, Sums& sums) {
    take_out_factor<T>(sums.c);
    if (slice_ == 0) {
      multiply_slab<T>(
          p_, warp_, kWarps, [&](int i) { return row_of(tile, i); }, [&](int i) { return token_of(i); },
          sums.c);
    }
    float* partial = p_.split.partial + (int64_t{tile} * p_.split.splits + slice_) * p_.m * kRows;
#pragma unroll
    for (int r = 0; r < kRowTiles; ++r) {
      sync_threads();  // others may still read what stands there
#pragma unroll
      for (int i = 0; i < kTokenTiles; ++i) {
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          store(&shared_->sum[warp_][i * 8 + 2 * t_ + e % 2][g_ + e / 2 * 8], sums.c[r][i][e]);
        }
      }
      sync_threads();
      for (int element = thread_index(); element < p_.m * 16; element += kThreads) {
        const int token = element / 16, row = element % 16;
        float sum = 0;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) sum += load(&shared_->sum[w][token][row]);
        if (p_.split.splits == 1) {
          write(tile * kRows + r * 16 + row, token, sum);
        } else {
          store(partial + token * kRows + r * 16 + row, sum);
        }
      }
    }
    if (p_.split.splits > 1 && is_last_of_tile(p_.split.counter + tile, p_.split.splits, &shared_->last))
      add_slices(tile);
  }

  DEVICE void add_slices(int tile) const {
    const int elements = p_.m * kRows;
    const float* part = p_.split.partial + int64_t{tile} * p_.split.splits * elements;
    for (int element = thread_index(); element < elements; element += kThreads) {
      float sum = 0;
      for (int slice = 0; slice < p_.split.splits; ++slice)
        sum += load(part + int64_t{slice} * elements + element);
      write(tile * kRows + element % kRows, element / kRows, sum);
    }
  }
};

}  // namespace peft_kernels::cuda
