// The permutation of 16-byte units within rows of shared memory that bulk copies and wgmma know.
#pragma once

#include <cstdint>

namespace ptx {

// `span`: bytes of a row, 32, 64 or 128; 16: none. Of the PTX ISA's tables: among 8 rows of 128 bytes, the
// units of a row are permuted by exclusive or with the row's number.
inline uint64_t swizzled(uint64_t address, uint32_t span) {
  constexpr int kUnitShift = 4, kRowShift = 7;
  const uint64_t units = span / 16 - 1;
  return address ^ ((address >> kRowShift & units) << kUnitShift);
}

}  // namespace ptx
