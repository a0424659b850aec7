// Whether dense products of ours at level amx are as fast as torch's, and ops compute them. It is for
// bench/amx_check.sh to write this file, by what it measures on a machine with AMX; it has not run there yet.
#pragma once

namespace peft_kernels::cpu {

inline constexpr bool kAmxHasFastDense = true;

}  // namespace peft_kernels::cpu
