// The head of a loss on CUDA: its GEMMs, piece by piece, and the rows that they leave out.
#pragma once

#include "../linear/linear_gemm.h"

namespace peft_kernels::cuda {

// The logits that exist at a time: 1024 rows of a vocabulary of 128,000 in 16 bits. There the GEMMs are bound
// by arithmetic (an H100 multiplies for 1.3 ms while it reads a head of 1 GB in 0.3), and their tiles fill
// the card. All logits of 4x2048 tokens are eight times as many, and torch's loss copies them in fp32.
inline constexpr int64_t kLogitBytes = 256 << 20;
#ifdef PEFT_KERNELS_PTX
void set_logit_bytes(int64_t bytes);
#endif
// How many of `count` rows, of `length` logits each, or columns, to compute at a time.
int64_t logit_chunk(int64_t count, int64_t length, int64_t element_size);

// The indices of the rows that have a label, int64 [count]. Undefined: all rows are computed, and those
// without a label have zeros.
//
// The host waits for the device here: it must know the count to make the GEMMs smaller. Of a conversation's
// tokens perhaps a sixth have a label. The head of an 8B model takes an H100 22 ms of a step of 4x2048
// tokens, 4 ms without the others; waiting costs the launches that were queued ahead, less than 0.1 ms.
// During capture nothing may wait, and a replay may have other labels: all rows are computed.
Tensor rows_with_label(const Tensor& labels, int64_t ignore_index);

// x in rows, and its head: dense of x's dtype, to which an fp32 one is rounded as under autocast, or NF4.
class LossHead {
 public:
  LossHead(const Tensor& weight, const OptionalTensor& absmax, const OptionalTensor& absmax2,
           const OptionalTensor& offset, int64_t layout, int64_t vocabulary, const OptionalTensor& bias,
           const Tensor& x);

  // x W^T + bias for some rows of x. Rows of the result may lie apart.
  Tensor logits(const Tensor& x) const;
  // out = d W, of x's dtype.
  void gradient(const Tensor& d, Tensor out) const;

  // Calls body(begin, end, weight [end - begin, in_features], bias) for pieces of the vocabulary, with `rows`
  // rows of logits.
  using Piece =
      c10::function_ref<void(int64_t begin, int64_t end, const Tensor& weight, const OptionalTensor& bias)>;
  void by_pieces(int64_t rows, int64_t element_size, Piece body) const;

 private:
  const BaseWeight base_;
  const OptionalTensor bias_;
  const at::TensorOptions options_;  // of x
};

// x W^T + bias, with rows that begin at multiples of 16 bytes, whatever the vocabulary.
Tensor aligned_logits(const Tensor& x, const Tensor& weight, const OptionalTensor& bias);

}  // namespace peft_kernels::cuda
