// Ops say themselves in which dtypes they compute.
#pragma once

#include <c10/core/DispatchKeySet.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

namespace peft_kernels {

// While it lives, torch's own ops do not see autocast: a product of theirs would come out in another type
// than the kernels that take it are told. Python's calls leave autocast behind already; C++ callers of the
// dispatcher, and calls below its autocast keys, do not.
class WithoutAutocast {
  const c10::impl::ExcludeDispatchKeyGuard guard_{c10::autocast_dispatch_keyset};
};

}  // namespace peft_kernels
