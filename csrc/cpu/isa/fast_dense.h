// Whether our dense GEMMs with AMX are as fast as torch's, so that ops use them.
// Written by bench/amx_check.sh: torch's time / ours, forward and backward of a LoRA layer,
// Intel Xeon, 2 cores, torch 2.11.0:
//   4096x4096 M=16: 1.02
//   4096x4096 M=128: 1.05
//   4096x4096 M=512: 1.16
//   4096x4096 M=2048: 1.15
//   1536x576 M=256: 1.13
//   1536x576 M=1024: 1.46
//   1536x576 M=4096: 0.96
// Their geometric mean is 1.12.
#pragma once

namespace peft_kernels::cpu {

inline constexpr bool kAmxHasFastDense = true;

}  // namespace peft_kernels::cpu
