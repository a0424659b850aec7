// The GEMMs of a head, by torch or the kernels of NF4 weights, and the rows that have a label.
#include <ATen/ATen.h>
// Ahead of all others: it is precompiled (tools/precompiled.py).

#include "cross_entropy_head.h"

namespace peft_kernels::cuda {
namespace {

// Up to here reading the head takes as long as multiplying by it: fewer rows save nothing.
constexpr int64_t kFewRows = 256;

#ifdef PEFT_KERNELS_PTX
int64_t most_bytes = kLogitBytes;
#else
constexpr int64_t most_bytes = kLogitBytes;
#endif

}  // namespace

#ifdef PEFT_KERNELS_PTX
void set_logit_bytes(int64_t bytes) { most_bytes = bytes; }
#endif

int64_t logit_chunk(int64_t count, int64_t length, int64_t element_size) {
  return piece_of(count, length, element_size, most_bytes);
}

Tensor rows_with_label(const Tensor& labels, int64_t ignore_index) {
  if (labels.numel() <= kFewRows || is_capturing()) return {};
  const Tensor index = at::nonzero(at::ne(labels, ignore_index)).squeeze(1);
  return index.numel() == labels.numel() ? Tensor() : index;
}

LossHead::LossHead(const Tensor& weight, const OptionalTensor& absmax, const OptionalTensor& absmax2,
                   const OptionalTensor& offset, int64_t layout, int64_t vocabulary,
                   const OptionalTensor& bias, const Tensor& x)
    : base_(!absmax && weight.scalar_type() == at::kFloat ? weight.to(x.scalar_type()) : weight, absmax,
            absmax2, offset, layout, vocabulary, x.size(1), x.scalar_type()),
      bias_(bias),
      options_(x.options()) {
  // Kernels index a row in 32 bits.
  TORCH_CHECK(vocabulary <= int64_t{1} << 30, "vocabulary: expected at most ", int64_t{1} << 30, ", got ",
              vocabulary);
}

Tensor LossHead::logits(const Tensor& x) const {
  return base_.is_dense() ? aligned_logits(x, base_.dense(), bias_) : BaseGemm::forward(x, base_).run(bias_);
}

void LossHead::gradient(const Tensor& d, Tensor out) const {
  base_.is_dense() ? at::mm_out(out, d, base_.dense()) : out.copy_(BaseGemm::backward(d, base_).run());
}

void LossHead::by_pieces(int64_t rows, int64_t element_size, Piece body) const {
  const int64_t step = logit_chunk(base_.out_features(), rows, element_size);
  const auto divide = [&](int64_t begin, int64_t end, const Tensor& weight) {
    for (int64_t first = begin; first < end; first += step) {
      const int64_t last = std::min(first + step, end);
      body(first, last, weight.slice(0, first - begin, last - begin),
           bias_ ? OptionalTensor(bias_->slice(0, first, last)) : std::nullopt);
    }
  };
  base_.is_dense() ? divide(0, base_.out_features(), base_.dense()) : by_row_pieces(base_, options_, divide);
}

Tensor aligned_logits(const Tensor& x, const Tensor& weight, const OptionalTensor& bias) {
  const int64_t width = 16 / static_cast<int64_t>(x.element_size()), cols = weight.size(0);
  Tensor logits = at::empty({x.size(0), ceil_div(cols, width) * width}, x.options()).slice(1, 0, cols);
  const Tensor transposed = weight.t();
  return bias ? at::addmm_out(logits, bias->to(x.scalar_type()), x, transposed)
              : at::mm_out(logits, x, transposed);
}

}  // namespace peft_kernels::cuda
