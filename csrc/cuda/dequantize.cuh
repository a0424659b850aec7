// NF4 weights back to floats, the double-quantised absmax unpacked on the way: bit-equal to
// peft_kernels/reference/nf4.py.
#pragma once

#include "../common/nf4.h"
#include "device.cuh"

namespace peft_kernels::cuda {

// The absmax of a block, plain or double-quantised. `map` is the dynamic map, in shared memory.
struct AbsmaxReader {
  const float* absmax;
  const uint8_t* q8;
  const float* absmax2;
  const float* offset;

  DEVICE float at(int64_t block, const float* map) const {
    if (absmax) return load_constant(absmax + block);
    const float scale = load_constant(absmax2 + (block >> nf4::kAbsmaxBlockShift));
    // Rounded twice: a fused multiply-add would not give the format's bits.
    return add_rn(multiply_rn(load(map + load_constant(q8 + block)), scale), load_constant(offset));
  }
};

// Part of a weight: `rows` rows of `cols` elements, the first of them element `first` of the flat weight. A
// thread takes units of 8 elements in a row: 4 bytes read, 16 or 32 written.
template <class T, bool kAligned>
struct DequantizeNf4 {
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerSm = 4;
  static constexpr int kUnit = 8;   // elements
  static constexpr int kUnits = 8;  // of a thread, all read before the first is decoded

  struct Params {
    const uint8_t* packed;
    AbsmaxReader absmax;
    int block_shift;
    int64_t first;
    int64_t ld;  // elements from one row of the weight to the next
    int64_t cols;
    int64_t units_per_row;  // below 2^32 in all, unless there is one row
    int64_t units;
    T* out;
    int64_t out_stride;
    float code[nf4::kCodes];
    float map[nf4::kDynamicCodes];
  };
  struct Shared {
    float code[nf4::kCodes];  // in 16 banks: lanes read it without conflicts
    float map[nf4::kDynamicCodes];
  };

  static DEVICE void run(const Params& p) {
    Shared* shared = shared_memory<Shared>();
    const int64_t unit = int64_t{block_index()} * kThreads * kUnits + thread_index();
    uint32_t words[kUnits];
    if constexpr (kAligned) {
#pragma unroll
      for (int i = 0; i < kUnits; ++i) {
        words[i] = 0;
        const Place at = place_of(p, unit + i * kThreads);
        if (at.count == kUnit)
          words[i] = load_once(reinterpret_cast<const uint32_t*>(p.packed + at.element / 2));
      }
    }
    const int thread = thread_index();
    if (thread < nf4::kCodes) store(&shared->code[thread], p.code[thread]);
    if (!p.absmax.absmax) store(&shared->map[thread], p.map[thread]);
    sync_threads();
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      const Place at = place_of(p, unit + i * kThreads);
      if (kAligned && at.count == kUnit) {
        write_unit(shared, words[i], p.absmax.at(at.element >> p.block_shift, shared->map), at.out);
      } else {
        for (int j = 0; j < at.count; ++j) write_element(p, shared, at.element + j, at.out + j);
      }
    }
  }

 private:
  struct Place {
    int64_t element;  // of the flat weight
    T* out;
    int count;
  };
  static DEVICE Place place_of(const Params& p, int64_t unit) {
    if (unit >= p.units) return {0, nullptr, 0};
    int64_t row = 0, col = unit;
    if (p.units != p.units_per_row) {
      row = static_cast<uint32_t>(unit) / static_cast<uint32_t>(p.units_per_row);
      col = unit - row * p.units_per_row;
    }
    col *= kUnit;
    const int64_t left = p.cols - col;
    return {p.first + row * p.ld + col, p.out + row * p.out_stride + col,
            left < kUnit ? static_cast<int>(left) : kUnit};
  }

  static DEVICE void write_unit(const Shared* shared, uint32_t word, float absmax, T* out) {
    float x[kUnit];
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      const uint32_t code = word >> (i / 2 * 8 + (i % 2 ? 0 : 4)) & 15;
      x[i] = multiply_rn(load(&shared->code[code]), absmax);
    }
    if constexpr (sizeof(T) == 4) {
      store(reinterpret_cast<Vec<float, 4>*>(out), {x[0], x[1], x[2], x[3]});
      store(reinterpret_cast<Vec<float, 4>*>(out) + 1, {x[4], x[5], x[6], x[7]});
    } else {
      store(reinterpret_cast<Words4*>(out),
            {pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]), pack2<T>(x[4], x[5]), pack2<T>(x[6], x[7])});
    }
  }

  static DEVICE void write_element(const Params& p, const Shared* shared, int64_t element, T* out) {
    const uint32_t byte = load_constant(p.packed + element / 2);
    const uint32_t code = element % 2 ? byte & 15 : byte >> 4;
    const float absmax = p.absmax.at(element >> p.block_shift, shared->map);
    store(out, from_float<T>(multiply_rn(load(&shared->code[code]), absmax)));
  }
};

struct UnpackAbsmax {
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerSm = 4;
  static constexpr int kPerThread = 4;
  static_assert(kThreads == nf4::kDynamicCodes);

  struct Params {
    AbsmaxReader absmax;
    int64_t blocks;
    float* out;
    float map[nf4::kDynamicCodes];
  };
  struct Shared {
    float map[nf4::kDynamicCodes];
  };

  static DEVICE void run(const Params& p) {
    Shared* shared = shared_memory<Shared>();
    store(&shared->map[thread_index()], p.map[thread_index()]);
    sync_threads();
    const int64_t first = int64_t{block_index()} * kThreads * kPerThread + thread_index();
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int64_t block = first + i * kThreads;
      if (block < p.blocks) store(p.out + block, p.absmax.at(block, shared->map));
    }
  }
};

}  // namespace peft_kernels::cuda
