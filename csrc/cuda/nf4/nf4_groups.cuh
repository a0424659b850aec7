// Dequantises int4 with its zero points, E4M3 and int8; bit-equal to peft_kernels/ops/nf4.
#pragma once

#include "../../common/codes.h"
#include "../core/device.cuh"
#include "nf4_groups.h"

namespace peft_kernels::cuda {

struct Int4 {
  static constexpr bool kBytes = false;
};
// The values of bytes, up to kFactor.
struct E4M3 {
  static constexpr bool kBytes = true;
  static constexpr float kFactor = 256.0f;
  // As fp16, which is 2^-8 times the value.
  static DEVICE float value(uint32_t code) {
    return to_float(fp16{static_cast<uint16_t>((code & 0x7f) << 7 | (code & 0x80) << 8)});
  }
};
struct Int8 {
  static constexpr bool kBytes = true;
  static constexpr float kFactor = 1.0f;
  static DEVICE float value(uint32_t code) { return static_cast<float>(static_cast<int8_t>(code)); }
};

// Each thread dequantises runs of kRun elements of a row. With kRun = 8 columns and `ld` are multiples of 8,
// and addresses are aligned: a run lies in one block, and is read and written as vectors. kRun = 1 takes any
// part.
template <class T, class Codes, int kRun>
struct DequantizeGroups {
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerSm = 4;
  static constexpr int kRuns = 4;  // of a thread

  struct Params {
    GroupsView weight;
    Part part;
    uint32_t runs_in_row, runs;
    T* out;
    int64_t out_stride;
  };
  struct Shared {};

  static DEVICE void run(const Params& p) {
    const uint32_t first = static_cast<uint32_t>(block_index()) * (kThreads * kRuns) + thread_index();
#pragma unroll
    for (int i = 0; i < kRuns; ++i) {
      const uint32_t at = first + i * kThreads;
      if (at >= p.runs) return;
      const uint32_t row = at / p.runs_in_row;
      const int64_t col = int64_t{at - row * p.runs_in_row} * kRun;
      dequantize(p.weight, p.part.row_begin + row, p.part.col_begin + col, p.part.ld,
                 p.out + row * p.out_stride + col);
    }
  }

 private:
  // Elements from `col` on of a row.
  static DEVICE void dequantize(const GroupsView& weight, int64_t row, int64_t col, int64_t ld, T* out) {
    const int64_t element = row * ld + col;
    float x[kRun];
    if constexpr (Codes::kBytes) {
      const int64_t block = (row >> weight.row_shift) * weight.blocks_in_row + (col >> weight.block_shift);
      const float scale = load_constant(static_cast<const float*>(weight.scale) + block) * Codes::kFactor;
      uint8_t codes[kRun];
      if constexpr (kRun == 1) {
        codes[0] = load_constant(weight.packed + element);
      } else {
        const auto words = load_once(reinterpret_cast<const Words2*>(weight.packed + element));
#pragma unroll
        for (int i = 0; i < kRun; ++i) codes[i] = static_cast<uint8_t>(words.v[i / 4] >> (i % 4 * 8));
      }
#pragma unroll
      for (int i = 0; i < kRun; ++i) x[i] = __fmul_rn(Codes::value(codes[i]), scale);
    } else {
      const int64_t block = element >> weight.block_shift;
      const uint16_t bits = load_constant(static_cast<const uint16_t*>(weight.scale) + block);
      const float scale = weight.has_bf16_scales ? to_float(bf16{bits}) : to_float(fp16{bits});
      const int zero = weight.zero_points ? load_constant(weight.zero_points + block) : kZeroPoint;
      uint32_t word;
      if constexpr (kRun == 1) {
        word = load_constant(weight.packed + element / 2) >> (element % 2 ? 0 : 4);
      } else {
        word = load_once(reinterpret_cast<const uint32_t*>(weight.packed + element / 2));
      }
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        // Of each byte the high nibble first.
        const int code = static_cast<int>(word >> (kRun == 1 ? 0 : i / 2 * 8 + (1 - i % 2) * 4) & 15);
        x[i] = __fmul_rn(static_cast<float>(code - zero), scale);
      }
    }
    if constexpr (kRun == 1) {
      store(out, from_float<T>(x[0]));
    } else if constexpr (sizeof(T) == 4) {
      auto* to = reinterpret_cast<Vec<float, 4>*>(out);
      store(to, {x[0], x[1], x[2], x[3]});
      store(to + 1, {x[4], x[5], x[6], x[7]});
    } else {
      store(reinterpret_cast<Words4*>(out),
            {pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]), pack2<T>(x[4], x[5]), pack2<T>(x[6], x[7])});
    }
  }
};

}  // namespace peft_kernels::cuda
