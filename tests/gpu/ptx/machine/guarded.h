// Memory with nothing behind it: what reads or writes beyond its end, rounded up to 16 bytes, is a
// segmentation fault. So it is with the latest few thousand pieces, as a process has few mappings.
#pragma once

#include <cstddef>

namespace peft_kernels::cudart {

// Null where the system has no more.
void* allocate_guarded(size_t bytes);
void free_guarded(void* pointer);

}  // namespace peft_kernels::cudart
