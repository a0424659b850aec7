// Build information in the library file. Python looks for these bytes before loading, and refuses a library
// built for other schemas or another torch, since loading it would abort the process.
#pragma once

#include "generated.h"

namespace peft_kernels {

__attribute__((used)) static const char kSpecHash[] = "PEFT_KERNELS_SPEC_HASH=" PEFT_KERNELS_SPEC_HASH;
__attribute__((used)) static const char kTorchVersion[] = "PEFT_KERNELS_TORCH=" PEFT_KERNELS_TORCH ";";

inline const char* spec_hash() { return kSpecHash + sizeof("PEFT_KERNELS_SPEC_HASH=") - 1; }

}  // namespace peft_kernels
