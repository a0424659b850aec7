// Rotary position embedding (rotary.cu).
#pragma once

#include "../core/kernels.h"

namespace peft_kernels::cuda {

// One of the tensors [sequences, rows, heads, features] that are rotated.
struct RotaryHeads {
  const void* x;                // contiguous in features
  int64_t sequence, row, head;  // strides of x
  int64_t heads;
  void* out;  // contiguous
};
// cos or sin, [sequences, rows, features].
struct RotaryAngles {
  const void* of;         // contiguous in features
  int64_t sequence, row;  // strides
};
struct Rotary {
  const RotaryHeads* heads;
  int64_t count;  // of tensors
  DType dtype;    // of x
  int64_t sequences, rows, features;
  RotaryAngles cos, sin;
  DType angle_dtype;  // fp32 or that of x
  bool inverse;
  DType out_dtype;
};
// One launch for up to four tensors.
void rotary(const Rotary& params, Stream stream);

}  // namespace peft_kernels::cuda
