// Dequantises packed weights, unpacking double-quantised absmax on the fly; bit-equal to
// peft_kernels/ops/nf4.
#pragma once

#include "nf4_tables.cuh"

namespace peft_kernels::cuda {

// Divides a unit's index by the units per row, as a multiplication and shift computed on the host.
struct RowsOfUnits {
  uint32_t units, factor;
  int shift;

  DEVICE uint32_t row_of(uint32_t unit) const { return __umulhi(unit, factor) >> shift; }
};

// `map` is in shared memory. Rounded twice, as the format requires: a fused multiply-add would change bits.
DEVICE float unpack_scale_rn(const PackedScale& packed, const float* map, float offset) {
  return __fadd_rn(__fmul_rn(load(map + packed.code), packed.scale), offset);
}

// How a weight's codes and scales are read: of NF4, and of any format.
struct ReadNf4 {
  static DEVICE float code(const Nf4View&, int code) { return kCodeTables.value[code]; }
  template <int kThreads>
  static DEVICE void fill(const Nf4View& weight, float* map) {
    fill_map<kThreads>(weight, map);
  }
  static DEVICE float offset(const Nf4View& weight) { return load_scale_offset(weight); }
  static DEVICE PackedScale scale(const Nf4View& weight, uint32_t block) { return load_scale(weight, block); }
};
struct ReadAny {
  static DEVICE float code(const Nf4View& weight, int code) { return code_value(weight, code); }
  template <int kThreads>
  static DEVICE void fill(const Nf4View& weight, float* map) {
    static_assert(kThreads == kScaleCodes);
    if (!weight.scale_values) return fill_map<kThreads>(weight, map);
    store(map + thread_index(), load_constant(weight.scale_values + thread_index()));
  }
  static DEVICE float offset(const Nf4View& weight) {
    return weight.scale_offset ? load_constant(weight.scale_offset) : -0.0f;  // changes no scale
  }
  static DEVICE PackedScale scale(const Nf4View& weight, uint32_t block) {
    const uint32_t code = load_constant(weight.scale_code + block);
    return {code, weight.scale ? load_constant(weight.scale + (block >> weight.scale_shift)) : 1.0f};
  }
};

template <class T>
struct DequantizeParams {
  static constexpr int kUnit = 8;                         // elements
  static constexpr int kStores = kUnit * sizeof(T) / 16;  // of a unit
  using Elements = Vec<T, kUnit / kStores>;

  Nf4View weight;
  RowsOfUnits rows;
  uint32_t units;  // up to 2^31
  uint32_t first;  // unit of the flat weight
  uint32_t ld;     // units from one row of the weight to the next
  Elements* out;
  uint32_t out_stride;
};

// Dequantises units of 8 elements: reads 4 bytes, writes 16 or 32. Every unit starts in a high nibble of an
// aligned word, lies inside one block, and is written to a 16-byte aligned address. Indices of units and of
// vectors written fit in 32 bits.
template <class T, class Read>
struct DequantizeUnits {
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerSm = 3;
  static constexpr int kUnits = 8;  // of a thread, all loaded before the first is decoded
  using Params = DequantizeParams<T>;
  static constexpr int kUnit = Params::kUnit, kStores = Params::kStores;
  using Elements = typename Params::Elements;

  struct Shared {
    float code[nf4::kCodes];  // in 16 banks: lanes read it without conflicts
    float map[nf4::kDynamicCodes];
  };

  static DEVICE void run(const Params& p) { decode(p, static_cast<uint32_t>(block_index())); }

  static DEVICE void decode(const Params& p, uint32_t block) {
    Shared* shared = shared_memory<Shared>();
    const int thread = thread_index();
    const uint32_t begin = block * (kThreads * kUnits) + thread;
    Unit units[kUnits];
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      // Past the end, the last unit again: avoids a branch.
      const uint32_t unit = begin + i * kThreads;
      units[i] = load_unit(p, unit < p.units ? unit : p.units - 1);
    }
    if (thread < nf4::kCodes) store(&shared->code[thread], Read::code(p.weight, thread));
    Read::template fill<kThreads>(p.weight, shared->map);
    const float offset = Read::offset(p.weight);
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kUnits; ++i) {
      if (begin + i * kThreads >= p.units) return;
      write_unit(*shared, units[i], offset, p.out + units[i].out);
    }
  }

 private:
  struct Unit {
    uint32_t word;
    PackedScale scale;
    uint32_t out;
  };

  static DEVICE Unit load_unit(const Params& p, uint32_t unit) {
    const uint32_t row = p.rows.row_of(unit), col = unit - row * p.rows.units;
    const uint32_t from = p.first + row * p.ld + col;
    constexpr int kUnitShift = 3;
    static_assert(kUnit == 1 << kUnitShift);
    return {load_once(reinterpret_cast<const uint32_t*>(p.weight.packed) + from),
            Read::scale(p.weight, from >> (p.weight.block_shift - kUnitShift)),
            row * p.out_stride + col * kStores};
  }

  static DEVICE void write_unit(const Shared& shared, const Unit& unit, float offset, Elements* out) {
    const float absmax = unpack_scale_rn(unit.scale, shared.map, offset);
    float x[kUnit];
    // Byte offsets into shared.code of the high and low nibble of each byte.
    constexpr uint32_t kOffsets = 0x3c3c3c3cu;
    const auto* codes = reinterpret_cast<const uint8_t*>(shared.code);
    const uint32_t offsets[2] = {unit.word >> 2 & kOffsets, unit.word << 2 & kOffsets};
#pragma unroll
    for (int i = 0; i < kUnit; ++i) {
      const uint32_t offset_of_code = __byte_perm(offsets[i % 2], 0, 0x4440u | static_cast<uint32_t>(i / 2));
      x[i] = __fmul_rn(load(reinterpret_cast<const float*>(codes + offset_of_code)), absmax);
    }
    if constexpr (sizeof(T) == 4) {
      store(out, {x[0], x[1], x[2], x[3]});
      store(out + 1, {x[4], x[5], x[6], x[7]});
    } else {
      store(reinterpret_cast<Words4*>(out),
            {pack2<T>(x[0], x[1]), pack2<T>(x[2], x[3]), pack2<T>(x[4], x[5]), pack2<T>(x[6], x[7])});
    }
  }
};

template <class T>
struct DequantizeNf4 : DequantizeUnits<T, ReadNf4> {};
template <class T>
struct DequantizeAny : DequantizeUnits<T, ReadAny> {};

struct DequantizeManyParams {
  DequantizeParams<bf16> first;
  uint32_t blocks;                                                  // of a weight
  int64_t packed_stride, code_stride, scale_stride, values_stride;  // from a weight to the next
  int64_t out_stride;                                               // in Elements
};

// Dequantises the same part of several weights, one behind the other in memory, as are their results.
template <class One>
struct DequantizeMany {
  static constexpr int kThreads = One::kThreads;
  static constexpr int kBlocksPerSm = One::kBlocksPerSm;
  using Shared = typename One::Shared;

  using Params = DequantizeManyParams;

  static DEVICE void run(const Params& p) {
    const auto block = static_cast<uint32_t>(block_index());
    const uint32_t expert = block / p.blocks;
    DequantizeParams<bf16> own = p.first;
    own.weight.packed += expert * p.packed_stride;
    own.weight.scale_code += expert * p.code_stride;
    own.weight.scale += expert * p.scale_stride;
    own.weight.scale_values += expert * p.values_stride;
    if (own.weight.scale_offset != nullptr) own.weight.scale_offset += expert;
    own.out += expert * p.out_stride;
    One::decode(own, block - expert * p.blocks);
  }
};

struct DequantizeExperts : DequantizeMany<DequantizeNf4<bf16>> {};
struct DequantizeAnyExperts : DequantizeMany<DequantizeAny<bf16>> {
  static constexpr int kBlocksPerSm = 2;  // three would leave too few registers
};

// Dequantises any part of a weight, element by element.
template <class T>
struct DequantizeElements {
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerSm = 4;
  static constexpr int kElements = 8;  // of a thread

  struct Params {
    Nf4View weight;
    int64_t first;  // element of the flat weight
    int64_t ld;     // elements from one row of the weight to the next
    int64_t rows, cols;
    T* out;
    int64_t out_stride;
  };
  using Shared = typename DequantizeUnits<T, ReadAny>::Shared;

  static DEVICE void run(const Params& p) {
    Shared* shared = shared_memory<Shared>();
    const int thread = thread_index();
    if (thread < nf4::kCodes) store(&shared->code[thread], ReadAny::code(p.weight, thread));
    ReadAny::template fill<kThreads>(p.weight, shared->map);
    const float offset = ReadAny::offset(p.weight);
    __syncthreads();
    const int64_t begin = int64_t{block_index()} * (kThreads * kElements) + thread;
    for (int i = 0; i < kElements; ++i) {
      const int64_t at = begin + i * kThreads;
      if (at >= p.rows * p.cols) return;
      const int64_t row = p.rows == 1 ? 0 : at / p.cols, col = at - row * p.cols;
      const int64_t element = p.first + row * p.ld + col;
      const uint32_t byte = load_constant(p.weight.packed + element / 2);
      const uint32_t code = element % 2 ? byte & 15 : byte >> 4;
      const auto block = static_cast<uint32_t>(element >> p.weight.block_shift);
      const float absmax = unpack_scale_rn(ReadAny::scale(p.weight, block), shared->map, offset);
      store(p.out + row * p.out_stride + col, from_float<T>(__fmul_rn(load(&shared->code[code]), absmax)));
    }
  }
};

struct UnpackAbsmax {
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerSm = 4;
  static constexpr int kPerThread = 4;
  static_assert(kThreads == nf4::kDynamicCodes);

  struct Params {
    const uint8_t* q8;
    const float* absmax2;
    const float* offset;
    int64_t blocks;
    float* out;
  };
  struct Shared {
    float map[nf4::kDynamicCodes];
  };

  static DEVICE void run(const Params& p) {
    Shared* shared = shared_memory<Shared>();
    store(&shared->map[thread_index()], kDynamicTable.value[thread_index()]);
    __syncthreads();
    const float offset = load_constant(p.offset);
    const int64_t first = int64_t{block_index()} * kThreads * kPerThread + thread_index();
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) {
      const int64_t block = first + i * kThreads;
      if (block >= p.blocks) return;
      const float scale = load_constant(p.absmax2 + (block >> nf4::kAbsmaxBlockShift));
      store(p.out + block, unpack_scale_rn({load_constant(p.q8 + block), scale}, shared->map, offset));
    }
  }
};

}  // namespace peft_kernels::cuda
