// The contents of a CUtensorMap as the stand-in for cuTensorMapEncodeTiled writes it and bulk copies read it:
// a layout of our own, as NVIDIA's is not public.
#pragma once

#include <cstdint>

namespace ptx {

struct TensorMap {
  static constexpr uint64_t kMark = 0x70616d20726f736e;
  static constexpr uint64_t kBytes = 128;
  static constexpr int kRank = 2;

  uint64_t mark = kMark;
  uint64_t address = 0;
  int64_t size[kRank] = {};  // elements, the inner dimension first
  int64_t row_bytes = 0;     // from one row to the next
  int32_t box[kRank] = {};
  int32_t element_bytes = 0;
  uint32_t span = 0;  // of the swizzle; 16: none
};
static_assert(sizeof(TensorMap) <= TensorMap::kBytes);

}  // namespace ptx
