// Where the ops are registered: namespaces begin with the name of the Python package, and a build for the
// Hugging Face Hub, of which several may be loaded at once, has a package name of its own.
#pragma once

#ifndef PEFT_KERNELS_PACKAGE
#  define PEFT_KERNELS_PACKAGE peft_kernels
#endif

#define PEFT_KERNELS_JOIN_(a, b) a##b
#define PEFT_KERNELS_JOIN(a, b) PEFT_KERNELS_JOIN_(a, b)
#define PEFT_KERNELS_NAMESPACE PEFT_KERNELS_JOIN(PEFT_KERNELS_PACKAGE, _cpu)
