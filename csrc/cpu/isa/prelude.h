// Included by each ISA's file before its target pragma: what a system header defines must stay baseline code.
#pragma once

#include <float.h>
#include <string.h>
#if defined(__x86_64__)
#  include <immintrin.h>
#elif defined(__aarch64__)
#  include <arm_neon.h>
#endif

#include "../../common/nf4.h"
#include "../core/dynamic_tables.h"
#include "../core/kernel_table.h"

// What an ISA may have in addition to its vectors: dot products of bf16 pairs, and AMX tiles. On x86, an
// ISA with such dot products has byte permutations too.
#ifndef PEFT_KERNELS_BF16_DOT
#  define PEFT_KERNELS_BF16_DOT 0
#endif
#if defined(__x86_64__)
#  define PEFT_KERNELS_PERMUTES_BYTES PEFT_KERNELS_BF16_DOT
#else
#  define PEFT_KERNELS_PERMUTES_BYTES 0
#endif
// Whether one vector permutation covers 32 entries, enough for two tables of 16 codes.
#if defined(__x86_64__)
#  define PEFT_KERNELS_TWO_TABLES PEFT_KERNELS_BF16_DOT
#else
#  define PEFT_KERNELS_TWO_TABLES 0
#endif
#ifndef PEFT_KERNELS_TILES
#  define PEFT_KERNELS_TILES 0
#endif
