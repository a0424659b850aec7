// The constant tables of packed weights on the device, and the scales of blocks.
#pragma once

#include "../../common/codes.h"
#include "../core/device.cuh"
#include "nf4.h"

namespace peft_kernels::cuda {

// A copy of a host table, which device code cannot read.
template <int kCount>
struct Table {
  float value[kCount] = {};

  constexpr explicit Table(const float (&from)[kCount]) {
    for (int i = 0; i < kCount; ++i) value[i] = from[i];
  }
};
// The values of all kinds of codes, one after another.
struct CodeTables {
  float value[kCodeKinds * nf4::kCodes] = {};

  constexpr CodeTables() {
    for (int i = 0; i < kCodeKinds * nf4::kCodes; ++i)
      value[i] = kCodeValues[i / nf4::kCodes].value[i % nf4::kCodes];
  }
};
DEVICE_TABLE CodeTables kCodeTables;
DEVICE float code_value(const Nf4View& weight, int code) {
  return kCodeTables.value[weight.first_code + code];
}
DEVICE_TABLE Table<nf4::kCodes - 1> kThresholdTable(nf4::kThresholds);
DEVICE_TABLE Table<nf4::kDynamicCodes> kDynamicTable(nf4::kDynamicMap);

// Fills `map` in shared memory with the value of each scale code, times a factor. Called by all threads of a
// block; a barrier must follow.
template <int kThreads>
DEVICE void fill_map(const Nf4View& weight, float* map, float factor = 1.0f) {
  static_assert(kThreads == nf4::kDynamicCodes);
  const int i = thread_index();
  store(map + i, (weight.scale_offset ? kDynamicTable.value[i] : 1.0f) * factor);
}
DEVICE float load_scale_offset(const Nf4View& weight, float factor = 1.0f) {
  return weight.scale_offset ? load_constant(weight.scale_offset) * factor : 0.0f;
}

// A loaded scale, not yet unpacked.
struct PackedScale {
  uint32_t code;
  float scale;
};
DEVICE PackedScale load_scale(const Nf4View& weight, uint32_t block) {
  return {load_constant(weight.scale_code + block),
          load_constant(weight.scale + (block >> weight.scale_shift))};
}

DEVICE float unpack_scale(const PackedScale& packed, const float* map, float offset) {
  return __fmaf_rn(load(map + packed.code), packed.scale, offset);
}

}  // namespace peft_kernels::cuda
