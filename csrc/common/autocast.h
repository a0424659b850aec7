// Ops choose their own compute dtypes.
#pragma once

#include <c10/core/DispatchKeySet.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

namespace peft_kernels {

// Excludes autocast while it lives: torch's own ops would return another dtype than our kernels expect. Calls
// from Python exclude it already; those of C++ callers of the dispatcher, and those below its autocast keys,
// do not.
class WithoutAutocast {
  const c10::impl::ExcludeDispatchKeyGuard guard_{c10::autocast_dispatch_keyset};
};

}  // namespace peft_kernels
