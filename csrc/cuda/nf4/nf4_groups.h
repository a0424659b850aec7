// Weights in int4, in E4M3 and in int8 on the device. No fused kernel takes them: they are dequantised and
// multiplied by torch's GEMM.
#pragma once

#include "nf4.h"

namespace peft_kernels::cuda {

// A weight (rows, cols). The scale of an element of int4 is scale[element >> block_shift], in 16 bits; of
// bytes scale[(row >> row_shift) * blocks_in_row + (col >> block_shift)], in fp32.
struct GroupsView {
  const uint8_t* packed;
  const void* scale;
  const uint8_t* zero_points;  // null: 8
  bool has_bytes, has_int8;    // int8, else E4M3
  bool has_bf16_scales;        // int4; else fp16
  int block_shift, row_shift;
  int64_t blocks_in_row;
};

// As dequantize_nf4.
void dequantize_groups(const GroupsView& weight, const Part& part, void* out, DType dtype, int64_t out_stride,
                       Stream stream);

}  // namespace peft_kernels::cuda
