// A hash of a tensor's bits (bits_hash.cu).
#pragma once

#include "kernels.h"

namespace peft_kernels::cuda {

// One partial sum per block: the hash is their sum modulo 2^64.
int64_t bits_hash_blocks(int64_t count, const Card& card);
// The hash of peft_kernels/core/fingerprint.py. words [count], sums [bits_hash_blocks()].
void bits_hash(const int64_t* words, int64_t count, int64_t* sums, const Card& card, Stream stream);

}  // namespace peft_kernels::cuda
