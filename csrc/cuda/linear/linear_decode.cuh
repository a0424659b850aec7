// Decodes NF4 codes to pairs of 16-bit values, the operands of matrix instructions, and multiplies them.
//
// A byte holds two neighbours of a row, as does a register of an operand, so one lookup in a table of 256
// pairs decodes both. The table is in shared memory, with a copy per lane: lane i's is in bank i, so lanes
// never conflict.
#pragma once

#include "../nf4/nf4_tables.cuh"
#include "linear.h"

namespace peft_kernels::cuda {

// Decoded values are multiplied by this factor before rounding to 16 bits; sums are divided by it afterwards.
// It is the factor for which the 16 rounded codes of NF4 are nearest to the exact ones, weighted by their
// frequency in weights.
template <class T>
inline constexpr float kCodeFactor = 0;
template <>
inline constexpr float kCodeFactor<bf16> = 1.436715f;
template <>
inline constexpr float kCodeFactor<fp16> = 1.36619f;

// A table with rows of 256 bytes at an address that is a multiple of 2^16: one instruction inserts a byte of
// codes into the address.
struct WideTable {
  static constexpr bool kIsWide = true;
  static constexpr uint32_t kAddress = kWideTableAddress;
  static constexpr int kRowBytes = 256;

  uint32_t lane;  // the address of the lane's copy

  DEVICE static uint32_t address(uint32_t) { return kAddress; }
  DEVICE uint32_t pair(uint32_t word, int byte) const {
    return load_shared(__byte_perm(word, lane, 0x7604u | static_cast<uint32_t>(byte) << 4));
  }
};
// Half the size, at any address, with two instructions: for cards with less than 128 KB of shared memory.
struct NarrowTable {
  static constexpr bool kIsWide = false;
  static constexpr int kRowBytes = 128;

  uint32_t lane;

  DEVICE static uint32_t address(uint32_t start) { return start; }
  DEVICE uint32_t pair(uint32_t word, int byte) const {
    return load_shared(lane + (__byte_perm(word, 0, 0x4440u | static_cast<uint32_t>(byte)) << 7));
  }
};

// Fills the table. `start` is the shared memory of the block, the first `bytes_before` bytes of which are in
// use before a wide table. Called by all threads; a barrier must follow.
template <class T, class Table, int kThreads>
DEVICE Table fill_table(const Nf4View& weight, uint8_t* start, uint32_t bytes_before,
                        float factor = kCodeFactor<T>) {
  constexpr int kRows = 256, kRowsOfWarp = kRows / (kThreads / kWarp);
  static_assert(kRowsOfWarp <= kWarp && kRowsOfWarp % 4 == 0);
  const int lane = lane_index(), first = warp_index() * kRowsOfWarp;
  const uint32_t start_address = shared_address(start), address = Table::address(start_address);
  if constexpr (Table::kIsWide) {
    // The block's memory starts later than the card reported: trap rather than overwrite other data.
    if (start_address + bytes_before > kWideTableAddress) __trap();
  }
  // A lane computes one row and writes 16 bytes of every fourth.
  const int mine = first + lane % kRowsOfWarp;
  const auto code = [&](int i) { return __fmul_rn(code_value(weight, i), factor); };
  const uint32_t pair = pack2<T>(code(mine >> 4), code(mine & 15));
  uint8_t* row = start + (address - start_address) + (first + lane / 8) * Table::kRowBytes + lane % 8 * 16;
#pragma unroll
  for (int i = 0; i < kRowsOfWarp; i += 4) {
    const uint32_t value = __shfl_sync(kAllLanes, pair, i + lane / 8);
    store(reinterpret_cast<Words4*>(row + i * Table::kRowBytes), {value, value, value, value});
  }
  return {address + static_cast<uint32_t>(lane) * 4};
}

// ---- The weight as first operand: 16 rows ("features") by a group of k, with x^T, 8 tokens wide -------
//
// The order of k within a group is free, as long as both operands use the same. Lane (g, t) loads the bytes
// from 8t on of rows g and g + 8. In step s of 4 it multiplies bytes 2s and 2s + 1, which hold k = 16t + 4s
// .. 16t + 4s + 3, so it needs 32 consecutive bytes of x for the group.

template <class Table>
DEVICE void decode_group(const Table& table, const Words2& row, const Words2& row8, uint32_t (&a)[4][4]) {
#pragma unroll
  for (int s = 0; s < 4; ++s) {
    const int byte = s % 2 * 2;
    a[s][0] = table.pair(row.v[s / 2], byte);
    a[s][1] = table.pair(row8.v[s / 2], byte);
    a[s][2] = table.pair(row.v[s / 2], byte + 1);
    a[s][3] = table.pair(row8.v[s / 2], byte + 1);
  }
}

struct GroupOfX {
  Words4 low, high;
};
// x: in shared memory, at 16t of the group in the lane's row.
template <class T>
DEVICE GroupOfX load_group_of_x(const T* x) {
  return {load(reinterpret_cast<const Words4*>(x)), load(reinterpret_cast<const Words4*>(x) + 1)};
}

template <class T>
DEVICE void multiply_step(float (&sums)[4], const uint32_t (&weight)[4], const GroupOfX& x, int s) {
  const Words4& half = s < 2 ? x.low : x.high;
  const uint32_t b[2] = {half.v[s % 2 * 2], half.v[s % 2 * 2 + 1]};
  mma<T>(sums, weight, b);
}
// sums[16, 8] += weight x^T, where rows g and g + 8 are multiplied by their scales.
template <class T>
DEVICE void multiply_group(const uint32_t (&weight)[4][4], const GroupOfX& x, float scale, float scale8,
                           float (&sums)[4]) {
  float c[4] = {};
#pragma unroll
  for (int s = 0; s < 4; ++s) multiply_step<T>(c, weight[s], x, s);
  sums[0] = __fmaf_rn(c[0], scale, sums[0]);
  sums[1] = __fmaf_rn(c[1], scale, sums[1]);
  sums[2] = __fmaf_rn(c[2], scale8, sums[2]);
  sums[3] = __fmaf_rn(c[3], scale8, sums[3]);
}

}  // namespace peft_kernels::cuda
