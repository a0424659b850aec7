// The names of the namespaces in which a library registers its ops: they begin with the name of the Python
// package. Builds for the Hugging Face Hub have package names of their own, so that several can be loaded at
// once.
#pragma once

#ifndef PEFT_KERNELS_PACKAGE
#  define PEFT_KERNELS_PACKAGE peft_kernels
#endif

#define PEFT_KERNELS_JOIN_(a, b) a##b
#define PEFT_KERNELS_JOIN(a, b) PEFT_KERNELS_JOIN_(a, b)
