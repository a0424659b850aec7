// Ops adamw and clip_factor: an optimizer step for all parameters.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <cmath>
#include <vector>

#include "../../common/adamw_args.h"
#include "../core/kernel_table.h"
#include "../core/namespace.h"
#include "../core/parallel.h"

namespace peft_kernels::cpu {
namespace {

// Elements per chunk, and per thread below which no further thread is woken.
constexpr int64_t kChunk = 64 * kStateBlock;
constexpr int64_t kStepGrain = kElementwiseGrain / 4;

struct Chunk {
  int64_t tensor, begin, end;
};

StepKind kind_of(c10::string_view name) {
  if (name == "adam") return StepKind::kAdam;
  return name == "lion" ? StepKind::kLion : StepKind::kAdamW;
}

StepTensor tensor_of(const AdamWArgs& args, size_t i) {
  const int64_t group = args.group[i], step = args.step.const_data_ptr<int64_t>()[i];
  const StepFactors f(args.beta1[group], args.beta2[group], args.eps[group], args.weight_decay[group],
                      args.lr.const_data_ptr<float>()[group], step, args.kind != "adam");
  StepTensor t{};
  t.param = args.params[i].mutable_data_ptr();
  t.grad = args.grads[i].const_data_ptr();
  t.dtype = dtype_of(args.params[i], "params");
  t.state1 = args.state1[i].mutable_data_ptr();
  if (!args.is_lion()) t.state2 = args.state2[i].mutable_data_ptr();
  if (args.is_8bit(i)) {
    t.absmax1 = args.absmax1[i].mutable_data_ptr<float>();
    if (!args.is_lion()) t.absmax2 = args.absmax2[i].mutable_data_ptr<float>();
  }
  if (args.is_compensated(i)) t.compensation = static_cast<BF16*>(args.compensation[i].mutable_data_ptr());
  t.numel = args.params[i].numel();
  t.b1 = f.b1;
  t.w1 = f.w1;
  t.b2 = f.b2;
  t.w2 = f.w2;
  t.rate = f.rate;
  t.floor = f.floor;
  t.decay = f.decay;
  t.weight_decay = f.weight_decay;
  t.lr = f.lr;
  t.stream = static_cast<uint32_t>(i);
  t.step = static_cast<uint32_t>(step);
  return t;
}

// Calls work(index) for every chunk, in one parallel region. Threads take the next chunk that is left, as
// they are not equally fast.
template <class Work>
void for_chunks(const std::vector<Chunk>& chunks, int64_t elements, const Work& work) {
  const int64_t threads = std::clamp<int64_t>(elements / kStepGrain, 1, get_num_threads());
  run_tasks(static_cast<int64_t>(chunks.size()), threads, [&](Share& share) {
    for (int64_t i; share.take(i);) work(i);
  });
}

void append_chunks(std::vector<Chunk>& chunks, int64_t tensor, int64_t numel) {
  for (int64_t begin = 0; begin < numel; begin += kChunk) {
    chunks.push_back({tensor, begin, std::min(begin + kChunk, numel)});
  }
}

float scale_of(const OptionalTensor& grad_scale) {
  return grad_scale ? 1.0f / *grad_scale->const_data_ptr<float>() : 1.0f;
}

// The factor of gradients, including `scale`, that limits their total norm to max_norm. One sum per chunk,
// added in order: the same in every run.
float clipped(float scale, double max_norm, const std::vector<StepTensor>& tensors,
              const std::vector<Chunk>& chunks, int64_t elements) {
  std::vector<double> sums(chunks.size());
  const auto squares = kernels().squares;
  for_chunks(chunks, elements, [&](int64_t c) {
    const StepTensor& t = tensors[chunks[c].tensor];
    sums[c] = squares(t.grad, t.dtype, scale, chunks[c].begin, chunks[c].end);
  });
  double sum = 0;
  for (double s : sums) sum += s;
  const float norm = static_cast<float>(std::sqrt(sum));
  const float clip = static_cast<float>(max_norm) / (norm + 1e-6f);
  return clip >= 1 ? scale : scale * clip;
}

Tensor clip_factor(at::TensorList grads, const OptionalTensor& grad_scale, double max_norm) {
  std::vector<StepTensor> tensors(grads.size());
  std::vector<Chunk> chunks;
  int64_t elements = 0;
  for (size_t i = 0; i < grads.size(); ++i) {
    tensors[i].grad = grads[i].const_data_ptr();
    tensors[i].dtype = dtype_of(grads[i], "grads");
    elements += grads[i].numel();
    append_chunks(chunks, static_cast<int64_t>(i), grads[i].numel());
  }
  Tensor factor = at::empty({}, grads[0].options().dtype(at::kFloat));
  *factor.mutable_data_ptr<float>() = clipped(scale_of(grad_scale), max_norm, tensors, chunks, elements);
  return factor;
}

void step_all(const AdamWArgs& args) {
  if (args.found_inf && *args.found_inf->const_data_ptr<float>() != 0) return;

  std::vector<StepTensor> tensors;
  std::vector<Chunk> chunks;
  tensors.reserve(args.params.size());
  int64_t elements = 0;
  for (size_t i = 0; i < args.params.size(); ++i) {
    tensors.push_back(tensor_of(args, i));
    const int64_t numel = tensors[i].numel;
    elements += numel;
    append_chunks(chunks, static_cast<int64_t>(i), numel);
  }

  StepParams step_params{kind_of(args.kind), 1.0f, args.seed.has_value(), 0};
  if (args.seed) step_params.seed = static_cast<uint64_t>(*args.seed->const_data_ptr<int64_t>());
  if (args.factor) {
    step_params.factor = *args.factor->const_data_ptr<float>();
  } else {
    step_params.factor = scale_of(args.grad_scale);
    if (args.max_grad_norm > 0) {
      step_params.factor = clipped(step_params.factor, args.max_grad_norm, tensors, chunks, elements);
    }
  }
  const auto kernel = kernels().step;
  for_chunks(chunks, elements, [&](int64_t c) {
    kernel(step_params, tensors[chunks[c].tensor], chunks[c].begin, chunks[c].end);
  });
}

}  // namespace

TORCH_LIBRARY_IMPL(PEFT_KERNELS_NAMESPACE, CPU, m) {
  m.impl("adamw", adamw_op<step_all>);
  m.impl("clip_factor", clip_factor_op<clip_factor>);
}

}  // namespace peft_kernels::cpu
