// Python bindings of the machine and of the CUDA runtime's replacement.
#pragma once

#include <pybind11/pybind11.h>

namespace peft_kernels::cudart {
void bind(pybind11::module_& module);
}  // namespace peft_kernels::cudart
