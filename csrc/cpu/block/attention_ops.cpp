// Ops attention and attention_backward, and the library function spans_of_mask.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <optional>
#include <tuple>
#include <vector>

#include "../../common/autocast.h"
#include "../../common/checks.h"
#include "../../common/integers.h"
#include "../core/namespace.h"
#include "../core/parallel.h"
#include "../lora/dropout.h"

namespace peft_kernels::cpu {
namespace {

inline int64_t padded_to(int64_t x, int64_t unit) { return ceil_div(x, unit) * unit; }

// With at least this many key heads, each is one task of the backward; with fewer, each query head is one,
// and the gradients of keys are summed afterwards. Not decided by the number of threads, as results must not
// depend on it.
constexpr int64_t kManyTasks = 8;

// [batch, rows, heads, features] with contiguous features.
Tensor heads_of(const Tensor& t, const char* name) {
  dtype_of(t, name);
  TORCH_CHECK(t.dim() == 4, name, ": expected shape (batch, rows, heads, features), got ", t.sizes());
  return t.stride(3) == 1 || t.size(3) <= 1 ? t : t.contiguous();
}

const void* at(const Tensor& t, int64_t sequence, int64_t head) {
  return element_ptr(t, sequence * t.stride(0) + head * t.stride(2));
}
void* mutable_at(const Tensor& t, int64_t sequence, int64_t head) {
  return const_cast<void*>(at(t, sequence, head));
}

struct AttentionArgs {
  Tensor q, k, v, spans;
  AttentionParams params{};  // the fields common to all tasks
  int64_t batch, heads, key_heads, group;

  AttentionArgs(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
                const std::optional<Tensor>& spans_in, bool is_causal, double scale, double dropout_p,
                const OptionalTensor& seed)
      : q(heads_of(q_in, "q")), k(heads_of(k_in, "k")), v(heads_of(v_in, "v")) {
    batch = q.size(0);
    heads = q.size(2);
    key_heads = k.size(2);
    check_dtype(k, q.scalar_type(), "k");
    check_dtype(v, q.scalar_type(), "v");
    check_shape(k, {batch, k.size(1), key_heads, q.size(3)}, "k");
    check_shape(v, k.sizes(), "v");
    TORCH_CHECK(key_heads > 0 && heads % key_heads == 0, "k: expected a divisor of ", heads, " heads, got ",
                key_heads);
    TORCH_CHECK(q.size(3) > 0, "q: expected features, got ", q.sizes());
    TORCH_CHECK(scale > 0, "scale: expected more than 0, got ", scale);
    group = heads / key_heads;
    params.dtype = dtype_of(q, "q");
    params.rows = q.size(1);
    params.keys = k.size(1);
    params.features = q.size(3);
    params.is_causal = is_causal;
    params.scale = static_cast<float>(scale);
    params.mask =
        mask_of(dropout_of(dropout_p, seed, 0), seed, padded_to(params.rows, kAttentionPad) * params.keys);
    params.q_head = q.stride(2);
    params.q_ld = q.stride(1);
    params.k_ld = k.stride(1);
    params.v_ld = v.stride(1);
    if (spans_in) {
      check_dtype(*spans_in, at::kInt, "spans");
      params.span_count = spans_in->dim() == 4 ? 2 : 1;
      if (params.span_count == 1) check_shape(*spans_in, {batch, params.rows, 2}, "spans");
      if (params.span_count == 2) check_shape(*spans_in, {batch, params.rows, 2, 2}, "spans");
      spans = spans_in->contiguous();
    }
  }

  // `count` query heads from `head` on, and their key head.
  AttentionParams head_params(int64_t sequence, int64_t head, int64_t count) const {
    AttentionParams p = params;
    p.q = at(q, sequence, head);
    p.k = at(k, sequence, head / group);
    p.v = at(v, sequence, head / group);
    p.heads = count;
    p.mask_first = (sequence * heads + head) * p.mask.ld;
    if (spans.defined()) p.spans = spans.const_data_ptr<int32_t>() + sequence * p.rows * p.span_count * 2;
    return p;
  }

  // Sets the output of the forward, `y`, from that head on.
  static void set_output(AttentionParams& p, const Tensor& y, int64_t sequence, int64_t head) {
    p.out = mutable_at(y, sequence, head);
    p.out_head = y.stride(2);
    p.out_ld = y.stride(1);
  }

  int64_t multiply_adds() const {
    return 2 * batch * heads * params.rows * params.keys * params.features / (params.is_causal ? 2 : 1);
  }
  Tensor workspace(bool is_backward) const {
    return at::empty({kernels().attention_workspace_bytes(params, is_backward) + kAlign},
                     q.options().dtype(at::kByte));
  }
  static void* aligned(const Tensor& workspace) {
    const auto address = reinterpret_cast<uintptr_t>(workspace.mutable_data_ptr());
    return reinterpret_cast<void*>(padded_to(static_cast<int64_t>(address), kAlign));
  }
  static constexpr int64_t kAlign = 64;
};

// Calls run(task, workspace) for all tasks, with one workspace per thread.
template <class Run>
void run_with_workspaces(const AttentionArgs& args, int64_t tasks, bool is_backward, const Run& run) {
  run_tasks(tasks, useful_threads(args.multiply_adds() * (is_backward ? 5 : 2) / 2), [&](Share& share) {
    const Tensor workspace = args.workspace(is_backward);
    for (int64_t task; share.take(task);) run(task, AttentionArgs::aligned(workspace));
  });
}

std::tuple<Tensor, Tensor> attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                     const std::optional<Tensor>& spans, bool is_causal, double scale,
                                     double dropout_p, const OptionalTensor& seed) {
  const WithoutAutocast without_autocast;
  const AttentionArgs args(q, k, v, spans, is_causal, scale, dropout_p, seed);
  Tensor y = at::empty(q.sizes(), q.options());
  const int64_t rows = args.params.rows;
  Tensor softmax = at::empty({args.batch, args.heads, 2, rows}, q.options().dtype(at::kFloat));
  if (y.numel() == 0) return {y, softmax};
  // Rows are divided into parts, scheduled from the last on: with a causal mask those have the most keys.
  const int64_t kv_heads = args.batch * args.key_heads;
  const int64_t parts =
      std::clamp<int64_t>(ceil_div(4 * get_num_threads(), kv_heads), 1, ceil_div(rows, kAttentionPad));
  const int64_t part = padded_to(ceil_div(rows, parts), kAttentionPad), part_count = ceil_div(rows, part);
  run_with_workspaces(args, kv_heads * part_count, false, [&](int64_t task, void* workspace) {
    const int64_t begin = (part_count - 1 - task / kv_heads) * part, which = task % kv_heads;
    const int64_t sequence = which / args.key_heads, head = which % args.key_heads * args.group;
    AttentionParams p = args.head_params(sequence, head, args.group);
    AttentionArgs::set_output(p, y, sequence, head);
    p.softmax = softmax.mutable_data_ptr<float>() + (sequence * args.heads + head) * 2 * rows;
    kernels().attention(p, begin, std::min(begin + part, rows), workspace);
  });
  return {y, softmax};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const Tensor& dy_in, const Tensor& q, const Tensor& k,
                                                      const Tensor& v, const std::optional<Tensor>& spans,
                                                      bool is_causal, double scale, double dropout_p,
                                                      const OptionalTensor& seed, const Tensor& y_in,
                                                      const Tensor& softmax_in) {
  const WithoutAutocast without_autocast;
  const AttentionArgs args(q, k, v, spans, is_causal, scale, dropout_p, seed);
  check_shape(dy_in, q.sizes(), "dy");
  check_dtype(dy_in, q.scalar_type(), "dy");
  check_shape(y_in, q.sizes(), "y");
  check_dtype(y_in, q.scalar_type(), "y");
  const int64_t rows = args.params.rows, keys = args.params.keys, features = args.params.features;
  check_shape(softmax_in, {args.batch, args.heads, 2, rows}, "softmax");
  check_dtype(softmax_in, at::kFloat, "softmax");
  const Tensor dy = heads_of(dy_in, "dy"), y = heads_of(y_in, "y"), softmax = softmax_in.contiguous();
  Tensor dq = at::empty(q.sizes(), q.options());
  if (q.numel() == 0 || k.numel() == 0) return {dq.zero_(), at::zeros_like(k), at::zeros_like(k)};
  const int64_t kv_heads = args.batch * args.key_heads;
  const int64_t parts = kv_heads >= kManyTasks ? 1 : args.group, tasks = kv_heads * parts;
  const int64_t padded_keys = padded_to(keys, kAttentionPad), padded = padded_to(features, kAttentionPad);
  // Gradients of keys and of values.
  Tensor sums = at::empty({2, tasks, padded_keys, padded}, q.options().dtype(at::kFloat));
  float* first = sums.mutable_data_ptr<float>();
  const int64_t size = padded_keys * padded, count = args.group / parts;
  run_with_workspaces(args, tasks, true, [&](int64_t task, void* workspace) {
    const int64_t sequence = task * count / args.heads, head = task * count % args.heads;
    AttentionParams p = args.head_params(sequence, head, count);
    AttentionArgs::set_output(p, y, sequence, head);
    p.softmax =
        const_cast<float*>(softmax.const_data_ptr<float>()) + (sequence * args.heads + head) * 2 * rows;
    p.dy = at(dy, sequence, head);
    p.dy_head = dy.stride(2);
    p.dy_ld = dy.stride(1);
    p.dq = mutable_at(dq, sequence, head);
    p.dq_head = dq.stride(2);
    p.dq_ld = dq.stride(1);
    p.dk_sums = first + task * size;
    p.dv_sums = first + (tasks + task) * size;
    std::fill_n(p.dk_sums, size, 0.0f);
    std::fill_n(p.dv_sums, size, 0.0f);
    kernels().attention_backward(p, workspace);
  });
  sums = sums.view({2, args.batch, args.key_heads, parts, padded_keys, padded})
             .narrow(4, 0, keys)
             .narrow(5, 0, features);
  sums = (parts == 1 ? sums.select(3, 0) : sums.sum(3)).transpose(2, 3);
  const auto gradient = [&](int64_t which) {
    return at::empty(k.sizes(), k.options()).copy_(sums.select(0, which));
  };
  return {dq, gradient(0), gradient(1)};
}

// The spans of one mask row; false if there are more than two.
bool find_spans(const char* row, int64_t keys, int32_t* spans) {
  const char *at = row, *end = row + keys;
  for (int count = 0;; ++count) {
    const void* first = at == end ? nullptr : std::memchr(at, 1, end - at);
    if (!first) return true;
    if (count == 2) return false;
    const void* last = std::memchr(first, 0, end - static_cast<const char*>(first));
    at = last ? static_cast<const char*>(last) : end;
    spans[2 * count] = static_cast<int32_t>(static_cast<const char*>(first) - row);
    spans[2 * count + 1] = static_cast<int32_t>(at - row);
  }
}

// The spans of keys that each row of a mask, bool [batch, rows, keys], attends to: int32 [batch, rows, 2, 2],
// as `attention` takes them; none if a row has more than two.
std::optional<Tensor> spans_of_mask(const Tensor& mask_in) {
  check_dtype(mask_in, at::kBool, "mask");
  TORCH_CHECK(mask_in.dim() == 3, "mask: expected shape (batch, rows, keys), got ", mask_in.sizes());
  const Tensor mask = mask_in.contiguous();
  const int64_t rows = mask.size(0) * mask.size(1), keys = mask.size(2);
  Tensor spans = at::zeros({mask.size(0), mask.size(1), 2, 2}, mask.options().dtype(at::kInt));
  const char* first = static_cast<const char*>(mask.const_data_ptr());
  int32_t* results = spans.mutable_data_ptr<int32_t>();
  std::atomic<bool> is_fit{true};
  constexpr int64_t kBytes = 1 << 18;  // per thread
  parallel_for(0, rows, std::max<int64_t>(1, kBytes / std::max<int64_t>(1, keys)),
               [&](int64_t begin, int64_t end) {
                 for (int64_t r = begin; r < end; ++r) {
                   if (!find_spans(first + r * keys, keys, results + r * 4)) is_fit.store(false);
                 }
               });
  return is_fit.load() ? std::optional<Tensor>(spans) : std::nullopt;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(PEFT_KERNELS_JOIN(PEFT_KERNELS_NAMESPACE, _library), m) {
  m.def("spans_of_mask(Tensor mask) -> Tensor?", spans_of_mask);
}

TORCH_LIBRARY_IMPL(PEFT_KERNELS_NAMESPACE, CPU, m) {
  m.impl("attention", attention);
  m.impl("attention_backward", attention_backward);
}

}  // namespace peft_kernels::cpu
