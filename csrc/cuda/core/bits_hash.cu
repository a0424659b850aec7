// Launches BitsHash.
#include "bits_hash.cuh"
#include "bits_hash.h"
#include "launch.cuh"

namespace peft_kernels::cuda {

int64_t bits_hash_blocks(int64_t count, const Card& card) {
  return std::min(ceil_div(count, BitsHash::kThreads), int64_t{card.sms} * BitsHash::kBlocksPerSm);
}

void bits_hash(const int64_t* words, int64_t count, int64_t* sums, const Card& card, Stream stream) {
  launch<BitsHash>({words, count, sums}, bits_hash_blocks(count, card), stream, sizeof(BitsHash::Shared));
}

}  // namespace peft_kernels::cuda
