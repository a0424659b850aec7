// The values of codes, and layouts: which values a packed weight's codes have, and how many of them share a
// scale. Free of torch; shared by every back end. In Python: peft_kernels/core/formats.py.
//
// Every packed weight is value(code) * scale(block). Codes have four bits but for E4M3's and int8's, which
// are bytes. With four bits a weight is flattened row-major and divided into blocks of `blocksize` elements;
// element 2i is the HIGH nibble of byte i, element 2i + 1 the low one. With bytes a scale is for `blocksize`
// columns of a row, or for the row; E4M3's is for as many rows as columns.
#pragma once

#include <cstdint>

#include "nf4.h"

namespace peft_kernels {

// The values of the 16 codes. Aligned so that a vector register is filled in one load.
struct alignas(64) CodeValues {
  float value[16];
  // Rounded to bf16 unscaled, the values of NF4 would be off by up to 2^-8, always in the same direction;
  // times its factor, found by search, none is off by more than 2^-9.3. The others' are then exact.
  float bf16_factor;
};

inline constexpr CodeValues values_of(const float (&values)[16], float bf16_factor) {
  CodeValues out{};
  for (int i = 0; i < 16; ++i) out.value[i] = values[i];
  out.bf16_factor = bf16_factor;
  return out;
}

// bitsandbytes' FP4: sign, 0, 1/16, 8, 12, 4, 6, 2, 3 over 12. Both zeros are positive.
inline constexpr float kFP4[16] = {0.0f,
                                   0.0052083334885537624f,
                                   0.6666666865348816f,
                                   1.0f,
                                   0.3333333432674408f,
                                   0.5f,
                                   0.1666666716337204f,
                                   0.25f,
                                   0.0f,
                                   -0.0052083334885537624f,
                                   -0.6666666865348816f,
                                   -1.0f,
                                   -0.3333333432674408f,
                                   -0.5f,
                                   -0.1666666716337204f,
                                   -0.25f};
// E2M1 of the OCP Microscaling formats.
inline constexpr float kE2M1[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                                    -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

// int4, whose values are code - zero point. Zero points are at most 16. Kernels read five bits of a zero
// point, and each of the 32 numbers has a table, so that no byte leads to a read out of bounds.
inline constexpr int kZeroPoint = 8, kZeroPoints = 32;
struct Int4Values {
  CodeValues at[kZeroPoints] = {};

  constexpr Int4Values() {
    for (int zero = 0; zero < kZeroPoints; ++zero) {
      for (int code = 0; code < 16; ++code) at[zero].value[code] = static_cast<float>(code - zero);
      at[zero].bf16_factor = 1.0f;
    }
  }
};
inline constexpr Int4Values kInt4Values;

// By the number in a layout. The numbers after them are those of bytes.
inline constexpr CodeValues kCodeValues[] = {values_of(nf4::kCode, 1.1888107061386108f),
                                             values_of(kFP4, 12.0f), values_of(kE2M1, 1.0f),
                                             kInt4Values.at[kZeroPoint]};
inline constexpr int64_t kCodeKinds = sizeof(kCodeValues) / sizeof(kCodeValues[0]);
inline constexpr int64_t kE2M1Codes = 2, kInt4Codes = 3;
inline constexpr int64_t kE4M3Codes = kCodeKinds, kInt8Codes = kCodeKinds + 1;
inline constexpr int64_t kSmallestByteBlock = 64, kByteBlock = 128;  // columns with a scale

// A layout is one integer: the number of its code values times 2^16, plus the blocksize; 0: a scale for each
// row.
inline constexpr int kLayoutShift = 16;
inline constexpr int64_t blocksize_of(int64_t layout) { return layout & ((int64_t{1} << kLayoutShift) - 1); }
inline constexpr int64_t codes_of(int64_t layout) { return layout >> kLayoutShift; }
inline constexpr int kSmallestBlocksize = 16;
inline constexpr int kWholeRowShift = 62;  // log2 of a blocksize that no row exceeds

inline constexpr bool is_layout(int64_t layout) {
  const int64_t size = blocksize_of(layout), codes = codes_of(layout);
  if (codes == kE4M3Codes) return size == 0 || size == kByteBlock;
  if (codes == kInt8Codes) return size == 0 || size == kSmallestByteBlock || size == kByteBlock;
  if (codes < 0 || codes >= kCodeKinds || (size & (size - 1)) != 0) return false;
  return size >= (codes == kE2M1Codes ? kSmallestBlocksize : nf4::kMinBlocksize) &&
         size <= nf4::kMaxBlocksize;
}

// Codes of scales: values of all 256 of them.
inline constexpr int64_t kScaleCodes = 256;
// The code of a scale of 1: NVFP4's scales, of blocks of 16, are E4M3, MXFP4's, of 32, are E8M0.
inline constexpr int kE4M3One = 0x38, kE8M0One = 0x7F;

}  // namespace peft_kernels
