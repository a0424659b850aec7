// Checked arguments of an optimizer step: nothing is changed before all of them are checked.
#pragma once

#include <ATen/ATen.h>

#include <cmath>

#include "checks.h"
#include "dynamic_map.h"

namespace peft_kernels {

inline void check_scalar(const OptionalTensor& t, at::ScalarType dtype, const char* name) {
  if (!t) return;
  check_dtype(*t, dtype, name);
  check_numel(*t, 1, name);
}

// The coefficients of one group's step.
struct StepFactors {
  float b1, w1, b2, w2, rate, floor, decay, weight_decay, lr;

  // Computed in fp64 and rounded once (ops/optim/adamw.py).
  StepFactors(double beta1, double beta2, double eps, double wd, double learning_rate, int64_t step,
              bool decoupled)
      : b1(static_cast<float>(beta1)),
        w1(static_cast<float>(1 - beta1)),
        b2(static_cast<float>(beta2)),
        w2(static_cast<float>(1 - beta2)),
        decay(decoupled ? static_cast<float>(1 - learning_rate * wd) : 1.0f),
        weight_decay(static_cast<float>(wd)),
        lr(static_cast<float>(learning_rate)) {
    const double steps = static_cast<double>(step);
    const double c1 = 1 - std::pow(beta1, steps), c2 = std::sqrt(1 - std::pow(beta2, steps));
    rate = static_cast<float>(-learning_rate * c2 / c1);
    floor = static_cast<float>(eps * c2);
  }
};

struct AdamWArgs {
  at::TensorList params, grads, state1, state2, absmax1, absmax2, compensation;
  const Tensor &step, &lr;
  at::IntArrayRef group;
  at::ArrayRef<double> beta1, beta2, eps, weight_decay;
  c10::string_view kind;
  const OptionalTensor &grad_scale, &found_inf;
  double max_grad_norm;
  const OptionalTensor &seed, &factor;

  bool is_lion() const { return kind == "lion"; }
  bool is_8bit(size_t i) const { return state1[i].scalar_type() == at::kByte; }
  bool is_compensated(size_t i) const { return !compensation.empty() && compensation[i].numel() > 0; }

  void check() const {
    TORCH_CHECK(kind == "adamw" || kind == "adam" || is_lion(), "kind: expected adamw, adam or lion, got ",
                kind);
    const size_t n = params.size(), second = is_lion() ? 0 : n;
    check_count(grads.size(), n, "grads");
    check_count(state1.size(), n, "state1");
    check_count(state2.size(), second, "state2");
    check_count(absmax1.size(), n, "absmax1");
    check_count(absmax2.size(), second, "absmax2");
    if (!compensation.empty()) check_count(compensation.size(), n, "compensation");
    check_count(group.size(), n, "group");
    check_dtype(step, at::kLong, "step");
    check_numel(step, static_cast<int64_t>(n), "step");
    check_dtype(lr, at::kFloat, "lr");
    const size_t groups = beta1.size();
    check_numel(lr, static_cast<int64_t>(groups), "lr");
    check_count(beta2.size(), groups, "beta2");
    check_count(eps.size(), groups, "eps");
    check_count(weight_decay.size(), groups, "weight_decay");
    TORCH_CHECK(step.is_contiguous() && lr.is_contiguous(), "step, lr: expected contiguous tensors");
    check_scalar(grad_scale, at::kFloat, "grad_scale");
    check_scalar(found_inf, at::kFloat, "found_inf");
    check_scalar(seed, at::kLong, "seed");
    check_scalar(factor, at::kFloat, "factor");
    for (size_t i = 0; i < n; ++i) check_one(i);
  }

 private:
  static void check_count(size_t got, size_t expected, const char* name) {
    TORCH_CHECK(got == expected, name, ": expected ", expected, " entries, got ", got);
  }
  static void check_entry(const Tensor& t, const Tensor& like, at::ScalarType dtype, const char* name,
                          size_t i) {
    check_device(t, name);
    TORCH_CHECK(t.device() == like.device() && t.scalar_type() == dtype && t.sizes() == like.sizes() &&
                    t.is_contiguous(),
                name, "[", i, "]: expected contiguous ", dtype, " of shape ", like.sizes(), " on ",
                like.device(), " like params, got ", t.scalar_type(), " of shape ", t.sizes(), " on ",
                t.device(), t.is_contiguous() ? "" : ", not contiguous");
  }
  void check_one(size_t i) const {
    const Tensor& p = params[i];
    dtype_of(p, "params");
    check_entry(p, p, p.scalar_type(), "params", i);
    check_entry(grads[i], p, p.scalar_type(), "grads", i);
    const at::ScalarType moment = is_8bit(i) ? at::kByte : at::kFloat;
    check_moment(state1[i], absmax1[i], p, moment, "state1", "absmax1", i);
    if (!is_lion()) check_moment(state2[i], absmax2[i], p, moment, "state2", "absmax2", i);
    if (is_compensated(i)) {
      TORCH_CHECK(p.scalar_type() == at::kBFloat16, "compensation[", i,
                  "]: is for bf16 parameters, got one of ", p.scalar_type());
      check_entry(compensation[i], p, at::kBFloat16, "compensation", i);
    }
    TORCH_CHECK(group[i] >= 0 && group[i] < static_cast<int64_t>(beta1.size()), "group[", i,
                "]: expected 0 to ", static_cast<int64_t>(beta1.size()) - 1, ", got ", group[i]);
  }
  static void check_moment(const Tensor& state, const Tensor& absmax, const Tensor& p, at::ScalarType dtype,
                           const char* name, const char* absmax_name, size_t i) {
    check_entry(state, p, dtype, name, i);
    check_device(absmax, absmax_name);
    if (dtype != at::kByte) return;
    const int64_t blocks = ceil_div(p.numel(), kStateBlock);
    TORCH_CHECK(absmax.scalar_type() == at::kFloat && absmax.numel() == blocks && absmax.is_contiguous() &&
                    absmax.device() == p.device(),
                absmax_name, "[", i, "]: expected ", blocks, " contiguous Float values on ", p.device(),
                ", got ", absmax.numel(), " of ", absmax.scalar_type(), " on ", absmax.device());
  }
};

// Op adamw: checks its arguments, then calls a back end's kStep.
template <void (*kStep)(const AdamWArgs&)>
void adamw_op(at::TensorList params, at::TensorList grads, at::TensorList state1, at::TensorList state2,
              at::TensorList absmax1, at::TensorList absmax2, at::TensorList compensation, const Tensor& step,
              at::IntArrayRef group, const Tensor& lr, at::ArrayRef<double> beta1, at::ArrayRef<double> beta2,
              at::ArrayRef<double> eps, at::ArrayRef<double> weight_decay, c10::string_view kind,
              const OptionalTensor& grad_scale, const OptionalTensor& found_inf, double max_grad_norm,
              const OptionalTensor& seed, const OptionalTensor& factor) {
  const AdamWArgs args{params, grads,      state1,    state2,        absmax1, absmax2, compensation,
                       step,   lr,         group,     beta1,         beta2,   eps,     weight_decay,
                       kind,   grad_scale, found_inf, max_grad_norm, seed,    factor};
  args.check();
  kStep(args);
}

// Op clip_factor, the same way.
template <Tensor (*kFactor)(at::TensorList, const OptionalTensor&, double)>
Tensor clip_factor_op(at::TensorList grads, const OptionalTensor& grad_scale, double max_grad_norm) {
  TORCH_CHECK(max_grad_norm > 0, "max_grad_norm: expected a positive number, got ", max_grad_norm);
  check_scalar(grad_scale, at::kFloat, "grad_scale");
  int64_t elements = 0;
  for (const Tensor& grad : grads) {
    dtype_of(grad, "grads");
    check_device(grad, "grads");
    TORCH_CHECK(grad.is_contiguous() && grad.device() == grads[0].device(),
                "grads: expected contiguous tensors on one device");
    elements += grad.numel();
  }
  TORCH_CHECK(elements > 0, "grads: expected some elements, got none");
  return kFactor(grads, grad_scale, max_grad_norm);
}

}  // namespace peft_kernels
