// Falls back to the composite implementation of an op, in Python, for arguments that no kernel here supports.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <string>

#include "runtime.h"

#define PEFT_KERNELS_NAME_(x) #x
#define PEFT_KERNELS_NAME(x) PEFT_KERNELS_NAME_(x)

namespace peft_kernels::cuda {

// Calls the composite implementation of `op`, given the function registered under its name. It is registered
// for PrivateUse1, the key of every device without kernels of its own.
template <class Result, class... Parameters, class... Args>
Result composed(Result (*)(Parameters...), const char* op, const Args&... args) {
  const std::string name = std::string(PEFT_KERNELS_NAME(PEFT_KERNELS_NAMESPACE)) + "::" + op;
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow(name.c_str(), "")
      .template typed<Result(Parameters...)>()
      .redispatch(c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), args...);
}

}  // namespace peft_kernels::cuda
