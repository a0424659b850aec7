// Allocates memory followed by an unmapped page: an access past its end, rounded up to 16 bytes, is a
// segmentation fault. Only the latest few thousand allocations are guarded, as a process has few mappings.
#pragma once

#include <cstddef>

namespace peft_kernels::cudart {

// Returns null if the system has no more memory.
void* allocate_guarded(size_t bytes);
void free_guarded(void* pointer);

}  // namespace peft_kernels::cudart
