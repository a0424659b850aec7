// Double quantisation of the absmax: 1/64 of the elements, so plain C++ serves every ISA.
#pragma once

#include <cstdint>

namespace peft_kernels::cpu {

// Groups [group_begin, group_end) of 256 absmax values, of `blocks` in all.
void quantize_absmax_groups(const float* absmax, int64_t blocks, float offset, int64_t group_begin,
                            int64_t group_end, uint8_t* q8, float* absmax2);

// absmax[i] for i in [begin, end).
void unpack_absmax_range(const uint8_t* q8, const float* absmax2, float offset, int64_t begin, int64_t end,
                         float* absmax);

}  // namespace peft_kernels::cpu
