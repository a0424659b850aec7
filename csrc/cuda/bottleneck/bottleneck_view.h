// The tensors of a bottleneck adapter as its kernels take them.
#pragma once

#include <ATen/ATen.h>

#include "../../common/bottleneck_args.h"
#include "bottleneck.h"

namespace peft_kernels::cuda {

// Whether the composite op serves an adapter: fp32, for which LoRA also uses torch's matmuls, or a layer
// norm.
inline bool is_composed(const BottleneckArgs& args) {
  return args.x.scalar_type() == at::kFloat || args.norm_weight.has_value();
}

inline const float* read(const Tensor& t) { return t.defined() ? t.const_data_ptr<float>() : nullptr; }
inline float* written(const Tensor& t) { return t.defined() ? t.mutable_data_ptr<float>() : nullptr; }

// Biases are fp32, or undefined if there are none.
inline BottleneckView view_of(const BottleneckArgs& args, const OptionalTensor& seed,
                              const Tensor& down_bias = {}, const Tensor& up_bias = {}) {
  const Dropout& dropout = args.dropout;
  return {dtype_of(args.x, "x"),
          args.m,
          args.k,
          args.n,
          static_cast<int>(args.r),
          args.down.const_data_ptr(),
          args.up.const_data_ptr(),
          dtype_of(args.down, "down"),
          dtype_of(args.up, "up"),
          args.activation,
          args.scaling,
          {dropout.threshold ? seed->const_data_ptr<int64_t>() : nullptr, dropout.stream, dropout.threshold,
           dropout.scale},
          read(down_bias),
          read(up_bias)};
}

}  // namespace peft_kernels::cuda
