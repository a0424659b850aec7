// Ops linear_cross_entropy and linear_cross_entropy_backward: the loss of a head without storing its logits.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <tuple>

#include "../../common/autocast.h"
#include "../../common/loss_args.h"
#include "../core/namespace.h"
#include "cross_entropy_gradients.h"
#include "cross_entropy_head.h"
#include "cross_entropy_loss.h"

namespace peft_kernels::cpu {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> linear_cross_entropy(
    const Tensor& x, const Tensor& weight, const OptionalTensor& absmax, const OptionalTensor& absmax2,
    const OptionalTensor& offset, int64_t layout, int64_t vocabulary, const OptionalTensor& bias,
    const Tensor& labels, int64_t ignore_index, double logit_scale, double softcap, double label_smoothing,
    double z_loss, bool need_dx, bool need_entropy, bool need_mean, bool need_squares) {
  const WithoutAutocast without_autocast;
  check_loss(x, labels, vocabulary, bias, softcap, label_smoothing);
  check_loss_need_dx(need_dx, softcap, label_smoothing);
  Head head(weight, absmax, absmax2, offset, layout, vocabulary, x);
  const Labelled labelled(labels, ignore_index, vocabulary);
  const auto floats = x.options().dtype(at::kFloat);
  const int64_t rows = x.size(0), features = x.size(1);
  const auto per_row = [&](bool need) { return at::zeros({need ? rows : 0}, floats); };
  Tensor loss = per_row(true), lse = per_row(true), entropy = per_row(need_entropy),
         mean = per_row(need_mean), squares = per_row(need_squares);
  Tensor top = at::zeros(entropy.sizes(), x.options().dtype(at::kBool));
  const bool all = labelled.count() == rows;
  const at::DimVector sizes{need_dx ? rows : 0, features};
  Tensor dx = all ? at::empty(sizes, x.options()) : at::zeros(sizes, x.options());
  if (labelled.count() == 0) return {loss, entropy, lse, top, mean, squares, dx};
  const Tensor index =
      at::from_blob(const_cast<int64_t*>(labelled.rows.data()), {labelled.count()}, labels.options());
  const Tensor chosen = all ? x.contiguous() : x.index_select(0, index);
  const Options options{static_cast<float>(logit_scale),
                        static_cast<float>(softcap),
                        label_smoothing,
                        z_loss,
                        need_dx,
                        need_entropy,
                        need_mean,
                        need_squares};
  const Tensor floats_bias = bias ? bias->to(at::kFloat).contiguous() : Tensor();
  Loss(chosen, head, vocabulary, floats_bias, labelled, options)
      .run({loss.mutable_data_ptr<float>(), lse.mutable_data_ptr<float>(), entropy.mutable_data_ptr<float>(),
            mean.mutable_data_ptr<float>(), squares.mutable_data_ptr<float>(), top.mutable_data_ptr<bool>(),
            static_cast<char*>(dx.mutable_data_ptr())});
  return {loss, entropy, lse, top, mean, squares, dx};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> linear_cross_entropy_backward(
    const Tensor& of_label, const Tensor& of_p, const OptionalTensor& of_pz, const Tensor& lse,
    const Tensor& x, const Tensor& weight, const OptionalTensor& absmax, const OptionalTensor& absmax2,
    const OptionalTensor& offset, int64_t layout, int64_t vocabulary, const OptionalTensor& bias,
    const OptionalTensor& h_in, const OptionalTensor& lora_b_in, const Tensor& labels, int64_t ignore_index,
    double logit_scale, double softcap, double label_smoothing, bool need_dx, bool need_dw, bool need_dbias,
    bool need_dh, bool need_db) {
  const WithoutAutocast without_autocast;
  check_loss(x, labels, vocabulary, bias, softcap, label_smoothing);
  const int64_t rows = x.size(0);
  check_loss_adapter(h_in, lora_b_in, rows, vocabulary);
  check_loss_backward(of_label, of_p, of_pz, lse, rows, absmax.has_value(), bias.has_value(),
                      h_in.has_value(), need_dw, need_dbias, need_dh, need_db);
  const Head head(weight, absmax, absmax2, offset, layout, vocabulary, x);
  const Labelled labelled(labels, ignore_index, vocabulary);
  const bool all = labelled.count() == rows;
  const Tensor index =
      at::from_blob(const_cast<int64_t*>(labelled.rows.data()), {labelled.count()}, labels.options());
  const auto chosen = [&](const Tensor& t) { return all ? t.contiguous() : t.index_select(0, index); };
  const auto floats = x.options().dtype(at::kFloat);
  const Tensor lora_b = lora_b_in ? lora_b_in->to(at::kFloat) : Tensor();
  const Tensor h = h_in ? chosen(h_in->to(at::kFloat)) : Tensor();
  const Tensor float_bias = bias ? bias->to(at::kFloat).contiguous() : Tensor();
  const Tensor x_rows = chosen(x), lse_rows = chosen(lse), of_label_rows = chosen(of_label),
               of_p_rows = chosen(of_p), of_pz_rows = of_pz ? chosen(*of_pz) : Tensor();

  const auto gradient = [&](bool needed, const Tensor& like, const at::TensorOptions& options) {
    return needed ? at::zeros(like.sizes(), options) : at::empty({0}, options);
  };
  Tensor dx = gradient(need_dx, x_rows, floats),
         dh = h_in ? gradient(need_dh, h, floats) : at::empty({0}, floats);
  Tensor dw = gradient(need_dw, weight, need_dw ? weight.options() : x.options());
  Tensor dbias = bias ? gradient(need_dbias, *bias, bias->options()) : at::empty({0}, x.options());
  Tensor db = lora_b_in ? gradient(need_db, *lora_b_in, lora_b_in->options()) : at::empty({0}, x.options());
  if (labelled.count() > 0) {
    LogitGradientParams params{};
    params.labels = labelled.labels.data();
    params.lse = lse_rows.const_data_ptr<float>();
    params.of_label = of_label_rows.const_data_ptr<float>();
    params.of_p = of_p_rows.const_data_ptr<float>();
    params.of_pz = of_pz_rows.defined() ? of_pz_rows.const_data_ptr<float>() : nullptr;
    params.vocabulary = vocabulary;
    params.scale = static_cast<float>(logit_scale);
    params.cap = static_cast<float>(softcap);
    params.smoothing = static_cast<float>(label_smoothing);
    LogitGradients logit_gradients(x_rows, h, lora_b, head, float_bias, params);
    logit_gradients.each([&](int64_t first, int64_t last, const Tensor& d, const Tensor& rounded) {
      if (need_dx) logit_gradients.add_back(rounded, first, dx);
      if (need_dw) {
        Tensor part = dw.slice(0, first, last);
        if (part.scalar_type() == x_rows.scalar_type()) {
          at::mm_out(part, rounded.t(), x_rows);
        } else {
          part.copy_(at::mm(rounded.t(), x_rows));
        }
      }
      if (need_dbias) dbias.slice(0, first, last).copy_(d.sum(0));
      if (need_dh) dh.addmm_(d, lora_b.slice(0, first, last));
      if (need_db) db.slice(0, first, last).copy_(at::mm(d.t(), h));
    });
  }
  const auto spread = [&](const Tensor& t, bool needed, const Tensor& like) {
    if (all || !needed) return t.to(like.scalar_type());
    return at::zeros(like.sizes(), like.options()).index_copy_(0, index, t.to(like.scalar_type()));
  };
  return {spread(dx, need_dx, x), dw, dbias, spread(dh, need_dh, h_in ? *h_in : x), db};
}

}  // namespace

TORCH_LIBRARY_IMPL(PEFT_KERNELS_NAMESPACE, CPU, m) {
  m.impl("linear_cross_entropy", linear_cross_entropy);
  m.impl("linear_cross_entropy_backward", linear_cross_entropy_backward);
}

}  // namespace peft_kernels::cpu
