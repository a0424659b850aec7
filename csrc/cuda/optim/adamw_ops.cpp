// The ops of optimizer steps: tensors to pointers, and registration. Schemas are in peft_kernels/ops/.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <type_traits>

#include "../../common/adamw_args.h"
#include "../core/runtime.h"
#include "device_table.h"

namespace peft_kernels::cuda {
namespace {

DeviceTables& tables() {
  static auto* tables = new DeviceTables;  // never destroyed: the device may be gone before
  return *tables;
}

template <class T>
void append(DeviceTables::Words& words, const T& value) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) % sizeof(uint64_t) == 0);
  const size_t at = words.size();
  words.resize(at + sizeof(T) / sizeof(uint64_t));
  std::memcpy(words.data() + at, &value, sizeof(T));
}

// Appends a tensor to the tables.
void append(Step& work, DeviceTables::Words& table, DeviceTables::Words& gradients, StepTensor t,
            const Tensor& grad) {
  t.first_block = work.blocks;
  work.blocks += ceil_div(t.numel, kStateBlock);
  ++work.count;
  append(table, t);
  append(gradients, grad.const_data_ptr());
}

StepTensor no_tensor() {
  StepTensor t;
  std::memset(static_cast<void*>(&t), 0, sizeof(t));  // tables are compared bytewise, padding included
  return t;
}

StepTensor tensor_of(const AdamWArgs& args, size_t i) {
  StepTensor t = no_tensor();
  t.param = args.params[i].mutable_data_ptr();
  t.state1 = args.state1[i].mutable_data_ptr();
  if (!args.is_lion()) t.state2 = args.state2[i].mutable_data_ptr();
  if (args.is_8bit(i)) {
    t.absmax1 = args.absmax1[i].mutable_data_ptr<float>();
    if (!args.is_lion()) t.absmax2 = args.absmax2[i].mutable_data_ptr<float>();
  }
  if (args.is_compensated(i)) t.compensation = args.compensation[i].mutable_data_ptr();
  t.numel = args.params[i].numel();
  t.dtype = dtype_of(args.params[i], "params");
  t.index = static_cast<int32_t>(i);
  t.group = static_cast<int32_t>(args.group[i]);
  t.has_vectors = are_aligned({t.param, t.state1, t.state2, t.compensation});
  return t;
}

const void* data_or_null(const OptionalTensor& t) { return t ? t->const_data_ptr() : nullptr; }

void step_all(const AdamWArgs& args) {
  if (args.params.empty()) return;
  const OnDeviceOf device(args.params[0], "params");
  for (const auto& [t, name] : {std::pair{&args.step, "step"}, {&args.lr, "lr"}}) check_device(*t, name);
  for (const auto& [t, name] : {std::pair{&args.grad_scale, "grad_scale"},
                                {&args.found_inf, "found_inf"},
                                {&args.seed, "seed"},
                                {&args.factor, "factor"}}) {
    if (*t) check_device(**t, name);
  }

  DeviceTables::Words table, gradients;
  Step work{};
  for (size_t i = 0; i < args.params.size(); ++i) {
    if (args.params[i].numel() != 0) append(work, table, gradients, tensor_of(args, i), args.grads[i]);
  }
  if (work.count == 0) return;
  for (size_t i = 0; i < args.beta1.size(); ++i) {
    append(table, StepGroup{args.beta1[i], args.beta2[i], args.eps[i], args.weight_decay[i]});
  }
  // Gradients have new addresses in most steps; everything else stays.
  const Tensor table_on_device = tables().find(table), gradients_on_device = tables().find(gradients);
  work.tensors = static_cast<const StepTensor*>(table_on_device.const_data_ptr());
  work.groups = reinterpret_cast<const StepGroup*>(work.tensors + work.count);
  work.grads = static_cast<const void* const*>(gradients_on_device.const_data_ptr());
  work.step = args.step.const_data_ptr<int64_t>();
  work.lr = args.lr.const_data_ptr<float>();
  work.grad_scale = static_cast<const float*>(data_or_null(args.grad_scale));
  work.found_inf = static_cast<const float*>(data_or_null(args.found_inf));
  work.seed = static_cast<const int64_t*>(data_or_null(args.seed));
  work.decay_into_gradient = args.kind == "adam";
  CallContext context;
  adamw_step(work, args.is_lion(), static_cast<float>(args.max_grad_norm),
             static_cast<const float*>(data_or_null(args.factor)), context);
}

Tensor clip_factor_of(at::TensorList grads, const OptionalTensor& grad_scale, double max_norm) {
  const OnDeviceOf device(grads[0], "grads");
  if (grad_scale) check_device(*grad_scale, "grad_scale");
  DeviceTables::Words table, gradients;
  Step work{};
  for (const Tensor& grad : grads) {
    if (grad.numel() == 0) continue;
    StepTensor t = no_tensor();
    t.numel = grad.numel();
    t.dtype = dtype_of(grad, "grads");
    append(work, table, gradients, t, grad);
  }
  const Tensor table_on_device = tables().find(table), gradients_on_device = tables().find(gradients);
  work.tensors = static_cast<const StepTensor*>(table_on_device.const_data_ptr());
  work.grads = static_cast<const void* const*>(gradients_on_device.const_data_ptr());
  work.grad_scale = static_cast<const float*>(data_or_null(grad_scale));
  Tensor factor = at::empty({}, grads[0].options().dtype(at::kFloat));
  CallContext context;
  clip_factor(work, static_cast<float>(max_norm), factor.mutable_data_ptr<float>(), context);
  return factor;
}

}  // namespace

TORCH_LIBRARY_IMPL(PEFT_KERNELS_NAMESPACE, PEFT_KERNELS_DISPATCH_KEY, m) {
  m.impl("adamw", adamw_op<step_all>);
  m.impl("clip_factor", clip_factor_op<clip_factor_of>);
}

}  // namespace peft_kernels::cuda
