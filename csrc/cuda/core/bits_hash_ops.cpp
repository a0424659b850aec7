// A hash of a tensor's bits for peft_kernels/core/fingerprint.py, which has the same in torch ops.
#include <ATen/ATen.h>
#include <torch/library.h>

#include "bits_hash.h"
#include "runtime.h"

#define PEFT_KERNELS_LIBRARY_(name) name##_library
#define PEFT_KERNELS_LIBRARY(name) PEFT_KERNELS_LIBRARY_(name)

namespace peft_kernels::cuda {
namespace {

// words: contiguous int64. Returns int64 (), without waiting for the device.
Tensor bits_hash_op(const Tensor& words) {
  const OnDeviceOf device(words, "words");
  check_dtype(words, at::kLong, "words");
  TORCH_CHECK(words.is_contiguous(), "words: expected contiguous memory, got strides ", words.strides());
  const Card& card = current_card();
  const Tensor sums = at::empty({bits_hash_blocks(words.numel(), card)}, words.options());
  bits_hash(words.const_data_ptr<int64_t>(), words.numel(), sums.mutable_data_ptr<int64_t>(), card,
            current_stream());
  return sums.sum();
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(PEFT_KERNELS_LIBRARY(PEFT_KERNELS_NAMESPACE), m) {
  m.def("bits_hash(Tensor words) -> Tensor", bits_hash_op);
}

}  // namespace peft_kernels::cuda
