// Ops of this back end, called from C++ by ops that are composed of them.
#pragma once

#include <ATen/ATen.h>
#include <ATen/core/dispatch/Dispatcher.h>

#include <string>
#include <tuple>
#include <vector>

#include "../../common/lora_args.h"
#include "namespace.h"

#define PEFT_KERNELS_TEXT_(name) #name
#define PEFT_KERNELS_TEXT(name) PEFT_KERNELS_TEXT_(name)

namespace peft_kernels::cpu {

using MultiLoraLinear = std::tuple<std::vector<Tensor>, Tensor>(
    const Tensor& x, at::TensorList weight, const OptionalTensors& absmax, const OptionalTensors& absmax2,
    const OptionalTensors& offset, at::IntArrayRef layout, at::IntArrayRef out_features, at::TensorList bias,
    at::TensorList lora_a, at::TensorList lora_b, at::IntArrayRef layer, at::ArrayRef<double> scaling,
    at::ArrayRef<double> dropout_p, const OptionalTensor& seed, at::IntArrayRef group,
    const OptionalTensor& row_group, const OptionalDtype& compute_dtype);
using GatedActivation = Tensor(const Tensor& gate, const Tensor& up, c10::string_view activation);
using RmsNorm = std::tuple<Tensor, Tensor>(const Tensor& x, const Tensor& weight, double eps, double offset,
                                           bool rounds, at::ScalarType dtype);
using AddRmsNorm = std::tuple<Tensor, Tensor, Tensor>(const Tensor& x, const Tensor& residual,
                                                      const Tensor& weight, double eps, double offset,
                                                      bool rounds, at::ScalarType dtype);
using Rotary = std::vector<Tensor>(at::TensorList x, const Tensor& cos, const Tensor& sin, bool inverse,
                                   at::ScalarType dtype);

template <class Signature>
c10::TypedOperatorHandle<Signature> op_of(const char* name) {
  const std::string full = std::string(PEFT_KERNELS_TEXT(PEFT_KERNELS_NAMESPACE) "::") + name;
  return c10::Dispatcher::singleton().findSchemaOrThrow(full.c_str(), "").typed<Signature>();
}

}  // namespace peft_kernels::cpu
