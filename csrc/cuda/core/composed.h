// Ops as they are made of others in Python, for what no kernel here takes.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

#include <string>

#include "runtime.h"

#define PEFT_KERNELS_NAME_(x) #x
#define PEFT_KERNELS_NAME(x) PEFT_KERNELS_NAME_(x)

namespace peft_kernels::cuda {

// `op` so, given the function that is registered under its name. That is the kernel of every device that has
// none of its own.
template <class Result, class... Parameters, class... Args>
Result composed(Result (*)(Parameters...), const char* op, const Args&... args) {
  const std::string name = std::string(PEFT_KERNELS_NAME(PEFT_KERNELS_NAMESPACE)) + "::" + op;
  return c10::Dispatcher::singleton()
      .findSchemaOrThrow(name.c_str(), "")
      .template typed<Result(Parameters...)>()
      .redispatch(c10::DispatchKeySet(c10::DispatchKey::PrivateUse1), args...);
}

}  // namespace peft_kernels::cuda
