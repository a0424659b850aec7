// What Python asks of the machine and the stand-in for CUDA's runtime.
#pragma once

#include <pybind11/pybind11.h>

namespace peft_kernels::cudart {
void bind(pybind11::module_& module);
}  // namespace peft_kernels::cudart
