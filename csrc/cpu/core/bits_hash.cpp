// A hash of a tensor's bits for peft_kernels/core/nf4_state.py, which has the same in torch ops and says what
// it is for. One pass over the memory, where torch takes eight.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <atomic>
#include <cstdint>

#include "../../common/checks.h"
#include "namespace.h"
#include "parallel.h"

namespace peft_kernels::cpu {
namespace {

// Constants of splitmix64.
constexpr uint64_t kStep = 0x9e3779b97f4a7c15, kMix1 = 0xbf58476d1ce4e5b9, kMix2 = 0x94d049bb133111eb;

uint64_t mixed(uint64_t word, uint64_t index) {
  uint64_t m = (word ^ (index * kStep)) * kMix1;
  m = (m ^ static_cast<uint64_t>(static_cast<int64_t>(m) >> 29)) * kMix2;
  return m ^ static_cast<uint64_t>(static_cast<int64_t>(m) >> 32);
}

// words: contiguous int64.
int64_t bits_hash(const Tensor& words) {
  check_dtype(words, at::kLong, "words");
  TORCH_CHECK(words.is_contiguous(), "words: expected contiguous memory, got strides ", words.strides());
  const int64_t* values = words.const_data_ptr<int64_t>();
  std::atomic<uint64_t> total{0};
  constexpr int64_t kWords = 1 << 16;  // per thread
  parallel_for(0, words.numel(), kWords, [&](int64_t begin, int64_t end) {
    uint64_t sum = 0;  // modulo 2^64, so the order does not matter
    for (int64_t i = begin; i < end; ++i) sum += mixed(static_cast<uint64_t>(values[i]), i);
    total.fetch_add(sum, std::memory_order_relaxed);
  });
  return static_cast<int64_t>(total.load());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(PEFT_KERNELS_JOIN(PEFT_KERNELS_NAMESPACE, _library), m) {
  m.def("bits_hash(Tensor words) -> int", bits_hash);
}

}  // namespace peft_kernels::cpu
