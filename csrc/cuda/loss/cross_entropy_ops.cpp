// The ops of a head's loss: tensors to pointers, and registration. Schemas live in peft_kernels/ops/.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <tuple>

#include "../../common/loss_args.h"
#include "cross_entropy.h"
#include "cross_entropy_head.h"

namespace peft_kernels::cuda {
namespace {

LossOptions options_of(int64_t vocabulary, int64_t ignore_index, double logit_scale, double softcap,
                       double label_smoothing, double z_loss) {
  return {vocabulary,
          ignore_index,
          static_cast<float>(logit_scale),
          static_cast<float>(softcap),
          static_cast<float>(label_smoothing),
          static_cast<float>(z_loss)};
}

LogitRows rows_of(const Tensor& logits) {
  return {logits.mutable_data_ptr(), dtype_of(logits, "logits"), logits.size(0), logits.stride(0)};
}

// The rows to compute, contiguous.
Tensor chosen(const Tensor& t, const Tensor& rows) {
  return rows.defined() ? t.index_select(0, rows) : t.contiguous();
}
// The reverse: all rows of a result, zeros where none was computed.
Tensor spread(const Tensor& t, const Tensor& rows, int64_t count) {
  return rows.defined() ? at::zeros({count, t.size(1)}, t.options()).index_copy_(0, rows, t) : t;
}

// The adapter of a head, whose term is added in fp32: h [rows, r] = scaling x A^T, and B [vocabulary, r].
struct Adapter {
  Tensor h, b;

  Adapter(const OptionalTensor& h_in, const OptionalTensor& lora_b, const Tensor& rows) {
    if (!h_in) return;
    h = chosen(h_in->to(at::kFloat), rows);
    b = lora_b->to(at::kFloat);
  }
  Tensor added(const Tensor& logits, const Tensor& h_rows, const Tensor& b_rows) const {
    return at::addmm(logits.to(at::kFloat), h_rows, b_rows.t());
  }
  // Of the logits.
  int64_t element_size(const Tensor& x) const {
    return h.defined() ? int64_t{sizeof(float)} : static_cast<int64_t>(x.element_size());
  }
};

using Losses = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

Losses losses_of(const Tensor& x_in, const LossHead& head, const OptionalTensor& h,
                 const OptionalTensor& lora_b, const Tensor& labels_in, const LossOptions& options,
                 bool need_dx, bool need_entropy, bool need_mean, bool need_squares) {
  const Tensor rows = rows_with_label(labels_in, options.ignore_index), x = chosen(x_in, rows);
  const Tensor labels = labels_in.contiguous();
  const Adapter adapter(h, lora_b, rows);
  const int64_t all = x_in.size(0), count = x.size(0);
  const auto result = [&](bool need, at::ScalarType dtype) {
    const auto made = x.options().dtype(dtype);
    return rows.defined() ? at::zeros({need ? all : 0}, made) : at::empty({need ? all : 0}, made);
  };
  const Tensor loss = result(true, at::kFloat), lse = result(true, at::kFloat);
  const Tensor entropy = result(need_entropy, at::kFloat), top = result(need_entropy, at::kBool);
  const Tensor mean = result(need_mean, at::kFloat), squares = result(need_squares, at::kFloat);
  const Tensor dx = at::empty({need_dx ? count : 0, x.size(1)}, x.options());
  const LossResults results{loss.mutable_data_ptr<float>(),
                            lse.mutable_data_ptr<float>(),
                            need_entropy ? entropy.mutable_data_ptr<float>() : nullptr,
                            need_mean ? mean.mutable_data_ptr<float>() : nullptr,
                            need_squares ? squares.mutable_data_ptr<float>() : nullptr,
                            need_entropy ? top.mutable_data_ptr<bool>() : nullptr};
  const int64_t step = logit_chunk(count, options.vocabulary, adapter.element_size(x));
  for (int64_t begin = 0; begin < count; begin += step) {
    const int64_t end = std::min(begin + step, count);
    Tensor logits = head.logits(x.slice(0, begin, end));
    if (h) logits = adapter.added(logits, adapter.h.slice(0, begin, end), adapter.b);
    cross_entropy(rows_of(logits), options, labels.const_data_ptr<int64_t>(),
                  rows.defined() ? rows.const_data_ptr<int64_t>() + begin : nullptr, begin, results, need_dx,
                  current_stream());
    if (need_dx) head.gradient(logits, dx.slice(0, begin, end));
  }
  return {loss, entropy, lse, top, mean, squares, need_dx ? spread(dx, rows, all) : dx};
}

Losses linear_cross_entropy_op(const Tensor& x, const Tensor& weight, const OptionalTensor& absmax,
                               const OptionalTensor& absmax2, const OptionalTensor& offset, int64_t layout,
                               int64_t vocabulary, const OptionalTensor& bias, const Tensor& labels,
                               int64_t ignore_index, double logit_scale, double softcap,
                               double label_smoothing, double z_loss, bool need_dx, bool need_entropy,
                               bool need_mean, bool need_squares) {
  const OnDeviceOf device(x, "x");
  check_loss(x, labels, vocabulary, bias, softcap, label_smoothing);
  check_loss_need_dx(need_dx, softcap, label_smoothing);
  const LossHead head(weight, absmax, absmax2, offset, layout, vocabulary, bias, x);
  return losses_of(x, head, std::nullopt, std::nullopt, labels,
                   options_of(vocabulary, ignore_index, logit_scale, softcap, label_smoothing, z_loss),
                   need_dx, need_entropy, need_mean, need_squares);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_trained_op(
    const Tensor& x, const Tensor& weight, const OptionalTensor& absmax, const OptionalTensor& absmax2,
    const OptionalTensor& offset, int64_t layout, int64_t vocabulary, const OptionalTensor& bias,
    const OptionalTensor& h, const OptionalTensor& lora_b, const Tensor& labels, int64_t ignore_index,
    double logit_scale, double softcap, double label_smoothing, double z_loss, bool need_entropy,
    bool need_mean, bool need_squares) {
  const OnDeviceOf device(x, "x");
  check_loss(x, labels, vocabulary, bias, softcap, label_smoothing);
  check_loss_adapter(h, lora_b, x.size(0), vocabulary);
  const LossHead head(weight, absmax, absmax2, offset, layout, vocabulary, bias, x);
  const auto [loss, entropy, lse, top, mean, squares, dx] =
      losses_of(x, head, h, lora_b, labels,
                options_of(vocabulary, ignore_index, logit_scale, softcap, label_smoothing, z_loss), false,
                need_entropy, need_mean, need_squares);
  return {loss, entropy, lse, top, mean, squares};
}

// Gradients summed over pieces of the vocabulary, in fp32.
void add_matmul(Tensor& sums, const Tensor& a, const Tensor& b) {
  a.scalar_type() == at::kFloat ? sums.addmm_(a, b) : sums.add_(at::mm(a, b));
}

// Piece by piece of the vocabulary: so each gradient of the head is complete in one GEMM, and the head is
// read twice.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_backward_op(
    const Tensor& of_label_in, const Tensor& of_p_in, const OptionalTensor& of_pz_in, const Tensor& lse_in,
    const Tensor& x_in, const Tensor& weight, const OptionalTensor& absmax, const OptionalTensor& absmax2,
    const OptionalTensor& offset, int64_t layout, int64_t vocabulary, const OptionalTensor& bias,
    const OptionalTensor& h, const OptionalTensor& lora_b, const Tensor& labels_in, int64_t ignore_index,
    double logit_scale, double softcap, double label_smoothing, bool need_dx, bool need_dw, bool need_dbias,
    bool need_dh, bool need_db) {
  const OnDeviceOf device(x_in, "x");
  check_loss(x_in, labels_in, vocabulary, bias, softcap, label_smoothing);
  check_loss_adapter(h, lora_b, x_in.size(0), vocabulary);
  check_loss_backward(of_label_in, of_p_in, of_pz_in, lse_in, x_in.size(0), absmax.has_value(),
                      bias.has_value(), h.has_value(), need_dw, need_dbias, need_dh, need_db);
  const LossHead head(weight, absmax, absmax2, offset, layout, vocabulary, bias, x_in);
  const Tensor rows = rows_with_label(labels_in, ignore_index), x = chosen(x_in, rows);
  const Tensor labels = chosen(labels_in, rows), lse = chosen(lse_in, rows);
  const Tensor of_label = chosen(of_label_in, rows), of_p = chosen(of_p_in, rows);
  const Tensor of_pz = of_pz_in ? chosen(*of_pz_in, rows) : Tensor();
  const Adapter adapter(h, lora_b, rows);
  const LossOptions options =
      options_of(vocabulary, ignore_index, logit_scale, softcap, label_smoothing, 0.0);
  const LogitFactors factors{lse.const_data_ptr<float>(), of_label.const_data_ptr<float>(),
                             of_p.const_data_ptr<float>(),
                             of_pz.defined() ? of_pz.const_data_ptr<float>() : nullptr};

  const auto sums = [&](bool need, const Tensor& like) {
    return need ? at::zeros(like.sizes(), x.options().dtype(at::kFloat)) : at::empty({0}, x.options());
  };
  const auto parts = [&](bool need, const OptionalTensor& like) {
    return need ? at::empty(like->sizes(), like->options()) : at::empty({0}, x.options());
  };
  Tensor dx = sums(need_dx, x), dh = sums(need_dh, adapter.h);
  const Tensor dw = parts(need_dw, weight), dbias = parts(need_dbias, bias), db = parts(need_db, lora_b);
  head.by_pieces(x.size(0), adapter.element_size(x),
                 [&](int64_t begin, int64_t end, const Tensor& weight_rows, const OptionalTensor& bias_part) {
                   Tensor d = aligned_logits(x, weight_rows, bias_part);
                   if (h) d = adapter.added(d, adapter.h, adapter.b.slice(0, begin, end));
                   cross_entropy_backward(rows_of(d), begin, end - begin, options,
                                          labels.const_data_ptr<int64_t>(), factors, current_stream());
                   const Tensor rounded = d.to(x.scalar_type());
                   if (need_dx) add_matmul(dx, rounded, weight_rows);
                   if (need_dw) dw.slice(0, begin, end).copy_(at::mm(rounded.t(), x));
                   if (need_dbias) dbias.slice(0, begin, end).copy_(d.sum(0, false, at::kFloat));
                   if (need_dh) add_matmul(dh, d, adapter.b.slice(0, begin, end));
                   if (need_db) db.slice(0, begin, end).copy_(at::mm(d.t(), adapter.h));
                 });
  const auto finished = [&](bool need, const Tensor& t, const Tensor& like) {
    return need ? spread(t.to(like.scalar_type()), rows, like.size(0)) : t;
  };
  return {finished(need_dx, dx, x_in), dw, dbias, finished(need_dh, dh, h ? *h : x_in), db};
}

}  // namespace

TORCH_LIBRARY_IMPL(PEFT_KERNELS_NAMESPACE, PEFT_KERNELS_DISPATCH_KEY, m) {
  m.impl("linear_cross_entropy", linear_cross_entropy_op);
  m.impl("linear_cross_entropy_trained", linear_cross_entropy_trained_op);
  m.impl("linear_cross_entropy_backward", linear_cross_entropy_backward_op);
}

}  // namespace peft_kernels::cuda
