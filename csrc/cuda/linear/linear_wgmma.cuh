// y = x W^T and dx = dY W with an NF4 weight, by the asynchronous matrix instructions of compute
// capability 9.0.
//
// A tile is 128 features by `tokens` of the result. Warps 0 to 7 are two warpgroups with 64 features each:
// they decode the weight in registers and multiply it by x in shared memory, so a weight is decoded once per
// 64 to 256 tokens. Warps 8 to 11 load stages of 64 terms into a ring in turn: TMA copies codes and x, the
// warp unpacks scales. While a stage is multiplied the next is decoded.
//
// Blocks have equal shares of all tiles' stages, as in LinearTiles. Each tile starts with the stages of the
// low-rank term, if there is one.
#pragma once

#include "../hopper/hopper_mma.cuh"
#include "linear_wgmma_operands.cuh"

namespace peft_kernels::cuda {

// Shares of the work are by stages.
template <class Groups>
struct WgmmaParams : Groups::Params {
  CUtensorMap weight_map, x_map, u_map;
};

#ifdef PEFT_KERNELS_HOPPER

template <class T, int kTokens, class Operand, class Groups>
class WgmmaBlock {
 public:
  static constexpr WgmmaShape kShape{kTokens};
  static constexpr int kConsumers = 2 * kWarpgroup, kProducers = kWarpgroup / kWarp;
  static constexpr int kStages = kShape.stages(), kDepth = WgmmaShape::kDepth;

  DEVICE explicit WgmmaBlock(const WgmmaParams<Groups>& p)
      : p_(p),
        operand_(p),
        stages_((operand_.terms() + kDepth - 1) / kDepth),
        groups_(p, kTokens, (operand_.features() + WgmmaShape::kFeatures - 1) / WgmmaShape::kFeatures,
                stages_, static_cast<int>(WgmmaShape::kSharingStages)),
        slab_stages_(Groups::kIsMany ? 0 : (p.slab.depth + kDepth - 1) / kDepth),
        begin_(groups_.work().begin()),
        end_(groups_.work().end()) {}

  DEVICE void run() {
    if (Groups::kIsMany && begin_ >= end_) return;
    const uint32_t start = shared_address(shared_memory<uint8_t>());
    // The block's memory starts later than the card reported: trap rather than overwrite other data.
    if (start > static_cast<uint32_t>(kMostReserved)) __trap();
    if (thread_index() == 0) {
      for (int i = 0; i < kStages; ++i) {
        init_barrier(full(i), 2);
        init_barrier(empty(i), kConsumers / kWarp);
      }
      fence_barrier_init();
    }
    __syncthreads();
    if (warp_index() >= kConsumers / kWarp) {
      if constexpr (kProducerRegisters > 0) give_registers<kProducerRegisters>();
      produce(shared_memory<uint8_t>() - start, warp_index() - kConsumers / kWarp);
    } else {
      if constexpr (kProducerRegisters > 0) take_registers<kConsumerRegisters>();
      const uint32_t table =
          fill_table<T, WideTable, kConsumers>(p_.weight, shared_memory<uint8_t>(), 0).lane;
      sync_threads<1, kConsumers>();
      consume(Operand::lane_of(warp_index(), table));
    }
  }

 private:
  static constexpr int kSums = kTokens / 2, kTokenTiles = kTokens / 8;
  // Where the same number for all threads (168) would not suffice. Adapters of experts need many for their
  // factors; producers of experts, for the place of the next stage.
  static constexpr int kProducerRegisters = kTokens == 256 ? 40 : Groups::kIsMany && kTokens == 128 ? 88 : 0;
  static constexpr int kConsumerRegisters = (3 * 168 - kProducerRegisters) / 2;
  static_assert(kProducerRegisters == 0 || kConsumerRegisters % 8 == 0);

  const WgmmaParams<Groups>& p_;
  const Operand operand_;
  const int stages_;  // of a tile
  Groups groups_;
  const int slab_stages_;
  const int begin_, end_;

  // ---- The ring ---------------------------------------------------------------------------------------

  static constexpr int kBarriers = kShape.barriers(), kWeights = kShape.weights(), kScales = kShape.scales();
  static constexpr int kFirstX = kShape.first_x(), kOtherX = kShape.other_x(), kXBytes = kShape.x_bytes();
  static constexpr int kMap = kShape.map(), kLast = kShape.last();

  static DEVICE uint32_t full(int slot) { return kBarriers + slot * 8; }
  static DEVICE uint32_t empty(int slot) { return kBarriers + (kStages + slot) * 8; }
  static DEVICE uint32_t weights_at(int slot) { return kWeights + slot * WgmmaShape::kWeightBytes; }
  static DEVICE uint32_t scales_at(int slot) { return kScales + slot * WgmmaShape::kScaleBytes; }
  static DEVICE uint32_t x_at(int slot) { return slot == 0 ? kFirstX : kOtherX + (slot - 1) * kXBytes; }
  struct Slot {
    int index = 0;
    uint32_t parity = 0;  // of the phase in which it is filled

    DEVICE void advance() {
      const bool wraps = ++index == kStages;
      index = wraps ? 0 : index;
      parity ^= wraps;
    }
  };
  // Neighbouring tiles share rows of the weight.
  DEVICE WgmmaPlace place_of(int tile) const {
    const RowTile rows = groups_.rows(tile % groups_.token_tiles, kTokens);
    return {tile / groups_.token_tiles * WgmmaShape::kFeatures, rows.begin, groups_.end_of(rows),
            rows.expert};
  }

  DEVICE int end_of(const WgmmaPlace& place) const { return Groups::kIsMany ? place.end : p_.m; }

  // ---- Producing --------------------------------------------------------------------------------------

  // A block's items are the stages of its tiles, those of low-rank terms first. Warps take them in turn: a
  // warp that waits for a slot has waited for it, or a later one, in the round before, so parities suffice.
  DEVICE void produce(uint8_t* shared, int warp) {
    float* map = reinterpret_cast<float*>(shared + kMap);
    for (int i = thread_index() - kConsumers; i < nf4::kDynamicCodes; i += kWarpgroup)
      store(map + i, (p_.weight.scale_offset ? kDynamicTable.value[i] : 1.0f) * kFactor);
    sync_threads<2, kWarpgroup>();
    float offset = load_scale_offset(p_.weight, kFactor);
    const int tile_items = slab_stages_ + stages_;
    const auto item_of = [&](int unit) {
      return unit / stages_ * tile_items + slab_stages_ + unit % stages_;
    };
    const int first = item_of(begin_) - (begin_ % stages_ == 0 ? slab_stages_ : 0),
              end = item_of(end_ - 1) + 1;
    PackedScale scales[kLaneScales] = {};
    WgmmaPlace next{};  // of experts: their places are loaded, too
    const auto load_scales = [&](int item) {
      const int term = (item % tile_items - slab_stages_) * kDepth;
      if (item >= end || term < 0) return;
      const WgmmaPlace place = next = place_of(item / tile_items);
      groups_.move_to(place.expert);
      if constexpr (Groups::kIsMany) offset = groups_.scale_offset(place.expert, kFactor);
#  pragma unroll
      for (int i = 0; i < kLaneScales; ++i)
        scales[i] =
            operand_.load_stage_scale(groups_.weight(), i * kWarp + lane_index(), place.feature, term);
    };
    load_scales(first + warp);
    for (int item = first + warp; item < end; item += kProducers) {
      const int stage = item % tile_items - slab_stages_, round = (item - first) / kStages;
      const Slot slot{(item - first) % kStages, static_cast<uint32_t>(round) & 1};
      const WgmmaPlace place = Groups::kIsMany ? next : place_of(item / tile_items);
      if (stage < 0) {
        fill_slab(slot, place.token, stage + slab_stages_);
      } else {
        fill(slot, place, stage * kDepth, scales, map, offset, shared);
      }
      load_scales(item + kProducers);
    }
  }
  static constexpr float kFactor = 1.0f / kCodeFactor<T>;  // of scales
  static constexpr int kLaneScales = WgmmaShape::kFeatures / kWarp;

  DEVICE void fill(Slot slot, const WgmmaPlace& place, int term, const PackedScale (&scales)[kLaneScales],
                   const float* map, float offset, uint8_t* shared) const {
    wait(empty(slot.index), slot.parity ^ 1);
    const uint32_t barrier = full(slot.index);
    if (lane_index() == 0) {
      arrive_expecting(barrier, WgmmaShape::kWeightBytes + kXBytes);
      operand_.copy_weight(weights_at(slot.index), p_.weight_map, place, term, barrier);
      copy_box(x_at(slot.index), p_.x_map, term, place.token, barrier);
    }
    uint8_t* to = shared + scales_at(slot.index);
#  pragma unroll
    for (int i = 0; i < kLaneScales; ++i) {
      operand_.store_stage_scale(to, i * kWarp + lane_index(), unpack_scale(scales[i], map, offset), term);
    }
    __syncwarp();
    if (lane_index() == 0) arrive(barrier);
  }
  // 64 of the depth of u, or what is left and zeros.
  DEVICE void fill_slab(Slot slot, int token, int stage) const {
    wait(empty(slot.index), slot.parity ^ 1);
    if (lane_index() == 0) {
      const uint32_t barrier = full(slot.index);
      arrive_expecting(barrier, kXBytes);
      copy_box(x_at(slot.index), p_.u_map, stage * kDepth, token, barrier);
      arrive(barrier);
    }
    __syncwarp();
  }

  // ---- Consuming --------------------------------------------------------------------------------------

  using Fragments = uint32_t[4][4];  // of a stage

  DEVICE void consume(const typename Operand::Lane& lane) const {
    Slot slot;
    for (int tile = begin_ / stages_; tile * stages_ < end_; ++tile) {
      const WgmmaPlace place = place_of(tile);
      const int before = tile * stages_, first = before < begin_ ? begin_ - before : 0;
      const int last = before + stages_ < end_ ? stages_ : end_ - before;
      float sums[kSums];
      multiply_zeros(sums);
      if (first == 0) multiply_slab(place, slot, sums);
      int pending = -1;
      Fragments even, odd;
      // No instruction may be in flight where paths meet, except in the loop: ptxas would serialise all.
      if ((last - first) % 2 != 0) {
        multiply_stage(lane, even, slot, pending, sums);
        multiply_finish(sums);
      }
#  pragma unroll 1
      for (int stage = (last - first) / 2; stage > 0; --stage) {
        multiply_stage(lane, even, slot, pending, sums);
        multiply_stage(lane, odd, slot, pending, sums);
      }
      multiply_finish(sums);
      release(pending);
      finish(tile, place, sums);
    }
  }
  // Multiplies the next stage. Its instructions are in flight on return, those before have finished.
  static DEVICE void multiply_stage(const typename Operand::Lane& lane, Fragments& a, Slot& slot,
                                    int& pending, float (&sums)[kSums]) {
    wait(full(slot.index), slot.parity);
    Operand::decode(lane, weights_at(slot.index), scales_at(slot.index), a);
    start_multiplying(a, slot.index, sums);
    multiply_wait<1>();
    if (pending >= 0) release(pending);
    pending = slot.index;
    slot.advance();
  }
  DEVICE void multiply_slab(const WgmmaPlace& place, Slot& slot, float (&sums)[kSums]) const {
    const int feature = place.feature + Operand::lane_feature(warp_index());
#  pragma unroll 1
    for (int stage = 0; stage < slab_stages_; ++stage) {
      Fragments a;
#  pragma unroll
      for (int s = 0; s < 4; ++s) operand_.load_slab(feature, stage * 4 + s, a[s]);
      wait(full(slot.index), slot.parity);
      start_multiplying<bf16>(a, slot.index, sums);
      multiply_finish(sums);
      release(slot.index);
      slot.advance();
    }
  }
  template <class Half = T>
  static DEVICE void start_multiplying(const Fragments& a, int slot, float (&sums)[kSums]) {
    const uint64_t x = describe_rows(x_at(slot));
    multiply_start();
#  pragma unroll
    for (int s = 0; s < 4; ++s) multiply_async<Half, kTokens>(sums, a[s], x + s * kDescriptorStep);
    multiply_commit();
  }
  static DEVICE void release(int slot) {
    __syncwarp();
    if (lane_index() == 0) arrive(empty(slot));
  }

  // ---- Writing ----------------------------------------------------------------------------------------

  DEVICE void finish(int tile, const WgmmaPlace& place, float (&sums)[kSums]) const {
    const Sharers sharers(groups_.work(), tile, stages_);
    if (Groups::kIsMany && sharers.is_first()) add_delta(place, sums);
    if (!sharers.is_one() && !add_blocks(sharers, place, sums)) return;
    write(place, sums);
  }
  // A lane's sums of eight tokens are those of a warp's matrix instruction.
  DEVICE void add_delta(const WgmmaPlace& place, float (&sums)[kSums]) const {
    constexpr int kAtOnce = 8;  // token tiles, to save registers
#  pragma unroll
    for (int first = 0; first < kTokenTiles; first += kAtOnce) {
      const int begin = place.token + first * 8 + lane_index() / 4;
      const auto token = [&](int i) { return begin + i * 8 < place.end ? begin + i * 8 : place.end - 1; };
      Operand::add_delta(groups_, place.expert, place.feature + Operand::lane_feature(warp_index()), token,
                         reinterpret_cast<float (&)[1][kAtOnce][4]>(sums[4 * first]));
    }
  }
  // Whether this block is the last to arrive at the tile; it then has the sums of all.
  DEVICE bool add_blocks(const Sharers& sharers, const WgmmaPlace& place, float (&sums)[kSums]) const {
    constexpr int64_t kElements = int64_t{WgmmaShape::kFeatures} * kTokens;
    Four* own = reinterpret_cast<Four*>(sharers.partial_of(block_index(), kElements)) + thread_index();
#  pragma unroll
    for (int i = 0; i < kTokenTiles; ++i) {
      if (place.token + i * 8 < end_of(place))
        store(own + i * kConsumers, {sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]});
    }
    sync_threads<1, kConsumers>();
    auto* last = reinterpret_cast<uint32_t*>(shared_memory<uint8_t>() -
                                             shared_address(shared_memory<uint8_t>()) + kLast);
    if (thread_index() == 0) {
      const uint32_t earlier = atomic_add_ordered(p_.work.counter + sharers.tile, 1);
      const bool is_last = earlier == static_cast<uint32_t>(sharers.last - sharers.first);
      if (is_last) store(p_.work.counter + sharers.tile, 0u);
      store(last, uint32_t{is_last});
    }
    sync_threads<1, kConsumers>();
    const bool is_last = load(last) != 0;
    sync_threads<1, kConsumers>();  // the word is written again for the next tile
    if (!is_last) return false;
#  pragma unroll
    for (int i = 0; i < kSums; ++i) sums[i] = 0.0f;
#  pragma unroll 1
    for (int block = sharers.first; block <= sharers.last; ++block) {
      const Four* part = reinterpret_cast<const Four*>(sharers.partial_of(block, kElements)) + thread_index();
#  pragma unroll
      for (int i = 0; i < kTokenTiles; ++i) {
        if (place.token + i * 8 >= end_of(place)) continue;
        const Four more = load(part + i * kConsumers);
#  pragma unroll
        for (int e = 0; e < 4; ++e) sums[4 * i + e] += more.v[e];
      }
    }
    return true;
  }
  // The lane has two neighbouring features of tokens 2t and 2t + 1 in each eight. Lanes (0, t) to (7, t)
  // together write 32 bytes of a row, for dx half of 64.
  DEVICE void write(const WgmmaPlace& place, const float (&sums)[kSums]) const {
    const int features = operand_.features();
    const int feature = place.feature + Operand::lane_feature(warp_index());
    const int token = place.token + lane_index() % 4 * 2;
    if (feature >= features) return;
    const bool is_pair = features % 2 == 0;
    float bias[2] = {};
    if (p_.bias) {
#  pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (feature + i < features)
          bias[i] = load_as_float(p_.bias, p_.bias_dtype, groups_.bias_row(place.expert, feature + i));
      }
    }
    T* const to = static_cast<T*>(p_.y) + int64_t{token} * features + feature;
#  pragma unroll
    for (int i = 0; i < kTokenTiles; ++i) {
#  pragma unroll
      for (int e = 0; e < 2; ++e) {
        if (token + i * 8 + e >= end_of(place)) continue;
        T* const at = to + int64_t{i * 8 + e} * features;
        const float y[2] = {sums[4 * i + e] + bias[0], sums[4 * i + 2 + e] + bias[1]};
        if (is_pair) {
          store(reinterpret_cast<uint32_t*>(at), pack2<T>(y[0], y[1]));
        } else {
          store(at, from_float<T>(y[0]));
          if (feature + 1 < features) store(at + 1, from_float<T>(y[1]));
        }
      }
    }
  }
};

#endif

template <class T, int kTokens, template <class> class Operand, class Groups>
struct WgmmaKernel {
  static constexpr int kThreads = 3 * kWarpgroup;
  static constexpr int kBlocksPerSm = 1;
  using Params = WgmmaParams<Groups>;
  struct Shared {
    uint8_t bytes[WgmmaShape{kTokens}.end()];  // from address 0 on
  };

  static DEVICE void run(const Params& p) {
#ifdef PEFT_KERNELS_HOPPER
    WgmmaBlock<T, kTokens, Operand<T>, Groups>(p).run();
#else
    __trap();  // compiled for another card
#endif
  }
};
#ifndef PEFT_KERNELS_HOPPER
template <class T>
struct WgmmaForward;
template <class T>
struct WgmmaBackward;
#endif

template <class T, int kTokens>
struct LinearWgmma : WgmmaKernel<T, kTokens, WgmmaForward, OneWeight> {};
template <class T, int kTokens>
struct LinearWgmmaDx : WgmmaKernel<T, kTokens, WgmmaBackward, OneWeight> {};
template <class T, int kTokens>
struct ExpertsWgmma : WgmmaKernel<T, kTokens, WgmmaForward, ManyWeights> {};
template <class T, int kTokens>
struct ExpertsWgmmaDx : WgmmaKernel<T, kTokens, WgmmaBackward, ManyWeights> {};

}  // namespace peft_kernels::cuda
