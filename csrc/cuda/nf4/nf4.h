// NF4 weights on the device, and the kernels that quantise and dequantise them.
#pragma once

#include "../core/kernels.h"

namespace peft_kernels::cuda {

// A packed weight on the device. The scale of a block is map[scale_code[block]] * scale[block >> scale_shift]
// + *scale_offset, with the map of double quantisation; with a plain absmax it is scale[block], and with
// scales that are codes it is scale_values[scale_code[block]].
struct Nf4View {
  const uint8_t* packed;
  const uint8_t* scale_code;  // plain absmax: any bytes
  const float* scale;         // null: ones, with scale_values
  const float* scale_offset;  // null: no double quantisation
  int scale_shift;
  int block_shift;            // log2 of the blocksize
  const float* scale_values;  // null: a map of ones
  int code_of_one;            // of scale_values, in proportion to which the others are exact in bf16
  int first_code;             // of its values in CodeTables

  bool is_nf4() const { return first_code == 0 && !scale_values; }
};

void quantize_nf4(const void* weight, DType dtype, int64_t numel, int block_shift, uint8_t* packed,
                  float* absmax, Stream stream);
// q8 and absmax2, for a given offset.
void quantize_absmax(const float* absmax, int64_t blocks, const float* offset, uint8_t* q8, float* absmax2,
                     Stream stream);
void unpack_absmax(const uint8_t* q8, const float* absmax2, const float* offset, int64_t blocks,
                   float* absmax, Stream stream);
// A submatrix of a weight with `ld` elements per row.
struct Part {
  int64_t row_begin, row_end;
  int64_t col_begin, col_end;
  int64_t ld;
};
// `out` has the size of the part and `out_stride` elements from row to row.
void dequantize_nf4(const Nf4View& weight, const Part& part, void* out, DType dtype, int64_t out_stride,
                    Stream stream);

// The weights of experts, one behind the other: the view of the first, and the steps to the next.
struct ManyNf4 {
  Nf4View first;
  int64_t packed_stride, code_stride, scale_stride, values_stride;
};
// The same part of all `experts` weights as bf16, one behind the other, by one kernel. The part starts at a
// multiple of 8 elements, its rows are longer than that, and its columns and `ld` are multiples of 8. packed
// and out are aligned to 4 and 16 bytes.
void dequantize_experts(const ManyNf4& weights, int64_t experts, const Part& part, void* out, Stream stream);

}  // namespace peft_kernels::cuda
