// Whether our dense GEMMs are as fast as torch's at ISA amx, so that ops use them. Written by
// bench/amx_check.sh from a measurement on a machine with AMX; it has not run there yet.
#pragma once

namespace peft_kernels::cpu {

inline constexpr bool kAmxHasFastDense = true;

}  // namespace peft_kernels::cpu
