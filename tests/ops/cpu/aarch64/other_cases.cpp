// The other kernels, against ISA scalar: bit for bit where that is specified, else within the error bound.
#include <cmath>
#include <cstring>
#include <iterator>
#include <limits>

#include "../../../../csrc/common/dynamic_map.h"
#include "cases.h"

namespace peft_kernels::cpu::cases {

static const Activation kActivations[] = {Activation::kSilu, Activation::kGelu, Activation::kGeluTanh,
                                          Activation::kRelu};
static constexpr int64_t kSize = 203;

PEFT_KERNELS_CASE(dropout) {
  for (DType dtype : kTypes) {
    const Array x = normal(dtype, 1003, 1);
    const auto use = [&](const KernelTable& table) {
      Array out(dtype, x.size());
      const DropoutParams params{
          x.data(), dtype, {0x123456789abcdef, 5, 0x40000000, 4.0f / 3, 1}, out.data()};
      table.dropout(params, 0, 6);
      table.dropout(params, 6, x.size());
      return Arrays{out};
    };
    both(tested, use, same_bits, name_of(dtype));
  }
}

PEFT_KERNELS_CASE(gated) {
  for (DType dtype : kTypes) {
    const Array gate = normal(dtype, kSize, 1, 4.0), up = normal(dtype, kSize, 2),
                dy = normal(dtype, kSize, 3);
    for (Activation activation : kActivations) {
      const auto use = [&](const KernelTable& table) {
        Array out(dtype, kSize), d_gate(dtype, kSize), d_up(dtype, kSize);
        const GatedParams params{gate.data(), up.data(),  dy.data(),     dtype,
                                 activation,  out.data(), d_gate.data(), d_up.data()};
        table.gated(params, 0, kSize);
        table.gated_backward(params, 0, kSize);
        return Arrays{out, d_gate, d_up};
      };
      both(tested, use, like_scalar, name_of(dtype) + " of " + std::to_string(static_cast<int>(activation)));
    }
  }
}

PEFT_KERNELS_CASE(layer_norm) {
  constexpr int64_t kRows = 3, kFeatures = 77;
  for (DType dtype : kTypes) {
    const Array x = normal(dtype, kRows * kFeatures, 1), dy = normal(dtype, kRows * kFeatures, 2);
    const Array weight = normal(DType::kF32, kFeatures, 3), bias = normal(DType::kF32, kFeatures, 4),
                d = normal(DType::kF32, kRows * kFeatures, 5);
    const auto use = [&](const KernelTable& table) {
      Array out(DType::kF32, kRows * kFeatures), dx(dtype, kRows * kFeatures),
          sums(DType::kF32, 2 * kFeatures);
      const Array workspace(DType::kF32, 2 * kFeatures);
      NormParams params{x.data(),         dtype,     kFeatures,       weight.as<float>(),
                        bias.as<float>(), 1e-5f,     out.as<float>(), d.as<float>(),
                        dy.data(),        dx.data(), sums.as<float>()};
      table.layer_norm(params, 0, kRows);
      params.out = workspace.as<float>();
      table.layer_norm_backward(params, 0, kRows);
      return Arrays{out, dx, sums};
    };
    both(tested, use, like_scalar, name_of(dtype));
  }
}

PEFT_KERNELS_CASE(bottleneck) {
  const Array z = normal(DType::kF32, kSize, 1);
  for (Activation activation : kActivations) {
    const auto use = [&](const KernelTable& table) {
      Array value(DType::kF32, kSize), d = normal(DType::kF32, kSize, 2), rounded_value(DType::kBF16, kSize),
                                       rounded_d(DType::kBF16, kSize);
      const BottleneckParams params{z.as<float>(), activation,          {9, 2, 0x30000000, 1.25f, 1},
                                    0.5f,          value.as<float>(),   rounded_value.as<BF16>(),
                                    d.as<float>(), rounded_d.as<BF16>()};
      table.bottleneck(params, 0, kSize);
      return Arrays{value, d, rounded_value, rounded_d};
    };
    both(tested, use, like_scalar, std::to_string(static_cast<int>(activation)));
  }
}

PEFT_KERNELS_CASE(rows_and_columns) {
  constexpr int64_t kRows = 70, kCols = 13;
  for (DType dtype : kTypes) {
    const Array x = normal(dtype, kRows * kCols, 1), dy = normal(dtype, kRows * kCols, 2),
                scale = normal(DType::kF32, kCols, 3), bias = normal(DType::kF32, kCols, 4);
    for (DType out_dtype : kTypes) {
      const auto transpose_rows = [&](const KernelTable& table) {
        Array out(out_dtype, kCols * kRows), copy(out_dtype, kRows * kCols);
        const TransposeParams params{x.data(),   dtype,     kRows, kCols, kCols,
                                     out.data(), out_dtype, kRows, 0.5f,  copy.data()};
        table.transpose_rows(params, 0, kTransposeRows);
        table.transpose_rows(params, kTransposeRows, kRows);
        return Arrays{out, copy};
      };
      both(tested, transpose_rows, same_bits, "transpose of " + name_of(dtype) + " to " + name_of(out_dtype));
    }
    const auto column_sums = [&](const KernelTable& table) {
      Array out(DType::kF32, kCols);
      table.column_sums({x.data(), dtype, kRows, kCols, 0.5f, out.as<float>()}, 0, kCols);
      return Arrays{out};
    };
    both(tested, column_sums, like_scalar, "sums of " + name_of(dtype));
    const auto scaled = [&](const KernelTable& table) {
      Array y(dtype, x.size()), dz(dtype, x.size()), d_scale(DType::kF32, kCols);
      const ScaleParams params{x.data(), dtype, scale.as<float>(), bias.as<float>(), y.data(),
                               kRows,    kCols, dy.data(),         dz.data(),        d_scale.as<float>()};
      table.scale_features(params, 0, kRows);
      table.scale_features_backward(params, 0, kCols);
      return Arrays{y, dz, d_scale};
    };
    both(tested, scaled, like_scalar, "scaled " + name_of(dtype));
    const auto squares = [&](const KernelTable& table) {
      Array out(DType::kF32, kRows + 1);
      table.row_squares({x.data(), dtype, kCols, nullptr}, kCols, 0, kRows, out.as<float>());
      out.set(kRows, table.squares(x.data(), dtype, 0.5f, 3, x.size()));
      return Arrays{out};
    };
    both(tested, squares, like_scalar, "squares of " + name_of(dtype));
  }
  const Weight weight(kRows * 96, 6, Form::kNested, 5);
  const auto squares = [&](const KernelTable& table) {
    Array out(DType::kF32, kRows);
    table.row_squares({nullptr, DType::kF32, 96, &weight.view}, 96, 0, kRows, out.as<float>());
    return Arrays{out};
  };
  both(tested, squares, like_scalar, "squares of a packed weight");
}

PEFT_KERNELS_CASE(conversions) {
  // Random bits: NaNs of every payload, infinities, subnormals.
  constexpr int64_t kRows = 64, kCols = 16;
  for (DType dtype : kTypes) {
    Array x(dtype, kRows * kCols);
    memcpy(x.data(), random_bytes(x.byte_count(), 1).data(), x.byte_count());
    const double infinity = std::numeric_limits<double>::infinity();
    const double odd[] = {std::nan(""), infinity, -infinity, 65519.0, 65520.0, 1e-7, -3e-8, 1e-40, 0.0, -0.0};
    for (size_t i = 0; i < std::size(odd); ++i) x.set(static_cast<int64_t>(i), odd[i]);
    for (DType out_dtype : kTypes) {
      const auto use = [&](const KernelTable& table) {
        Array out(out_dtype, kCols * kRows);
        table.transpose_rows({x.data(), dtype, kRows, kCols, kCols, out.data(), out_dtype, kRows}, 0, kRows);
        return Arrays{out};
      };
      both(tested, use, same_bits, name_of(dtype) + " to " + name_of(out_dtype));
    }
  }
}

PEFT_KERNELS_CASE(nan_comes_through) {
  for (Activation activation : kActivations) {
    Array gate = normal(DType::kF32, 8, 1), up = normal(DType::kF32, 8, 2), out(DType::kF32, 8);
    for (int64_t i = 0; i < gate.size(); i += 2) gate.set(i, std::nan(""));
    tested.gated({gate.data(), up.data(), nullptr, DType::kF32, activation, out.data(), nullptr, nullptr}, 0,
                 8);
    for (int64_t i = 0; i < out.size(); ++i) {
      if (std::isnan(out.at(i)) != (i % 2 == 0)) problem(std::to_string(static_cast<int>(activation)));
    }
  }
}

PEFT_KERNELS_CASE(softmax) {
  constexpr int64_t kRows = 5, kCols = 131, kFeatures = 40, kParts = 3;
  for (DType dtype : kTypes) {
    const Array bias = normal(dtype, kCols, 2), floats = normal(DType::kF32, kCols, 3);
    const int64_t labels[kRows] = {7, 0, 130, 500, 64};
    const auto piece = [&](const KernelTable& table) {
      Array logits = normal(dtype, kRows * kCols, 1, 3.0), out(dtype, kRows * kCols),
            states(DType::kF32, kRows * 5);
      for (int64_t i = 0; i < states.size(); ++i) states.set(i, i % 5 ? 0.0 : -1e30);
      SoftmaxParams params{};
      params.logits = logits.data();
      params.logits_dtype = dtype;
      params.logits_ld = params.out_ld = params.cols = kCols;
      params.bias = floats.as<float>();
      params.scale = 0.5f;
      params.cap = 5.0f;
      params.labels = labels;
      params.states = states.as<SoftmaxState>();
      params.need_weighted = params.need_total = true;
      params.out = out.data();
      params.out_dtype = dtype;
      table.softmax_tile(params, 0, kRows);
      return Arrays{states, out};
    };
    both(tested, piece, like_scalar, "piece of " + name_of(dtype));
    const Array sums = normal(DType::kF32, kParts * kFeatures, 4), mean = normal(DType::kF32, kFeatures, 5);
    const Array dense = normal(dtype, kFeatures, 6);
    const float factors[kParts] = {0.5f, 1.5f, -2.0f};
    const auto dx = [&](const KernelTable& table) {
      Array out(dtype, kFeatures);
      table.softmax_dx({sums.as<float>(),
                        factors,
                        kParts,
                        kFeatures,
                        kFeatures,
                        {dense.data(), dtype, kFeatures, nullptr},
                        0,
                        0.7f,
                        mean.as<float>(),
                        0.1f,
                        out.data(),
                        dtype});
      return Arrays{out};
    };
    both(tested, dx, like_scalar, "dx in " + name_of(dtype));
    const Array dloss = normal(DType::kF32, kRows, 7), lse = normal(DType::kF32, kRows, 8);
    const auto logit_gradients = [&](const KernelTable& table) {
      Array out = normal(DType::kF32, kRows * kCols, 9), rounded_out(dtype, kRows * kCols);
      table.logit_gradients({out.as<float>(), rounded_out.data(), dtype, 0, kCols, 500, floats.as<float>(),
                             0.5f, 5.0f, labels, dloss.as<float>(), lse.as<float>(), 0.1f, 0.01f},
                            0, kRows);
      return Arrays{rounded_out};
    };
    both(tested, logit_gradients, like_scalar, "logit gradients in " + name_of(dtype));
  }
}

PEFT_KERNELS_CASE(attention) {
  for (DType dtype : kTypes) {
    for (int64_t features : {64, 20, 7}) {
      constexpr int64_t kHeads = 2, kRows = 70, kKeys = 90;
      const int64_t padded = (features + 63) / 64 * 64, sums = 128 * padded;
      const Array q = normal(dtype, kHeads * kRows * features, 1), k = normal(dtype, kKeys * features, 2),
                  v = normal(dtype, kKeys * features, 3), dy = normal(dtype, q.size(), 4);
      for (bool has_spans : {false, true}) {  // and dropout
        std::vector<int32_t> spans;           // two disjoint spans per row; some are empty
        for (int32_t r = 0; r < kRows; ++r) spans.insert(spans.end(), {0, r % 16, 24, 24 + r});
        const auto use = [&](const KernelTable& table) {
          Array out(dtype, q.size()), dq(dtype, q.size()), softmax(DType::kF32, kHeads * 2 * kRows),
              dk_sums(DType::kF32, sums), dv_sums(DType::kF32, sums);
          memset(dk_sums.data(), 0, dk_sums.byte_count());
          memset(dv_sums.data(), 0, dv_sums.byte_count());
          AttentionParams params{};
          params.q = q.data(), params.k = k.data(), params.v = v.data(), params.dtype = dtype;
          params.q_head = params.out_head = params.dy_head = params.dq_head = kRows * features;
          params.q_ld = params.k_ld = params.v_ld = params.out_ld = params.dy_ld = params.dq_ld = features;
          params.heads = kHeads, params.rows = kRows, params.keys = kKeys, params.features = features;
          params.is_causal = true, params.scale = 0.3f;
          if (has_spans) {
            params.spans = spans.data(), params.span_count = 2;
            params.mask = {7, 0, 1u << 30, 4.0f / 3, 128 * kKeys}, params.mask_first = 64;
          }
          params.out = out.data(), params.softmax = softmax.as<float>(), params.dy = dy.data();
          params.dq = dq.data(), params.dk_sums = dk_sums.as<float>(), params.dv_sums = dv_sums.as<float>();
          const auto workspace = [&](bool is_backward) {
            const int64_t floats = table.attention_workspace_bytes(params, is_backward) / 4;
            return Array(DType::kF32, (floats + 15) / 16 * 16);
          };
          table.attention(params, 0, 64, workspace(false).data());
          table.attention(params, 64, kRows, workspace(false).data());
          table.attention_backward(params, workspace(true).data());
          // Rounded as in the op, and without the padding.
          Array dk(dtype, kKeys * features), dv(dk);
          for (int64_t i = 0; i < dk.size(); ++i) {
            const int64_t at = i / features * padded + i % features;
            dk.set(i, dk_sums.at(at)), dv.set(i, dv_sums.at(at));
          }
          return Arrays{out, dq, dk, dv};
        };
        both(tested, use, like_scalar,
             name_of(dtype) + " f" + std::to_string(features) + (has_spans ? " spans" : ""));
      }
    }
  }
}

static void step(const KernelTable& tested, DType dtype, StepKind kind, bool is_8bit, bool stochastic,
                 bool compensated) {
  constexpr int64_t kNumel = 2 * kStateBlock + 91, kBlocks = 3;
  const Array grad = normal(dtype, kNumel, 1);
  const auto use = [&](const KernelTable& table) {
    Array param = normal(dtype, kNumel, 2), compensation = normal(DType::kBF16, kNumel, 3, 1e-3);
    Array state1 = is_8bit ? random_bytes(kNumel, 4) : normal(DType::kF32, kNumel, 4, 0.1);
    Array state2 = is_8bit ? random_bytes(kNumel, 5) : normal(DType::kF32, kNumel, 5, 0.1);
    for (int64_t i = 0; !is_8bit && i < kNumel; ++i) state2.set(i, std::fabs(state2.at(i)));
    Array absmax1 = normal(DType::kF32, kBlocks, 6), absmax2 = absmax1;
    for (int64_t i = 0; i < kBlocks; ++i)
      absmax1.set(i, std::fabs(absmax1.at(i))), absmax2.set(i, absmax1.at(i));
    StepTensor tensor{};
    tensor.param = param.data(), tensor.grad = grad.data(), tensor.dtype = dtype, tensor.numel = kNumel;
    tensor.state1 = state1.data(), tensor.state2 = state2.data();
    if (is_8bit) tensor.absmax1 = absmax1.as<float>(), tensor.absmax2 = absmax2.as<float>();
    if (compensated) tensor.compensation = compensation.as<BF16>();
    tensor.b1 = 0.9f, tensor.w1 = 0.1f, tensor.b2 = 0.999f, tensor.w2 = 0.001f, tensor.rate = -1e-2f;
    tensor.floor = 1e-8f, tensor.decay = 0.9999f, tensor.weight_decay = 1e-2f, tensor.lr = 1e-2f;
    tensor.stream = 3, tensor.step = 4;
    table.step({kind, 0.5f, stochastic, 77}, tensor, 0, kNumel);
    return Arrays{param, compensation, state1, state2, absmax1, absmax2};
  };
  both(tested, use, same_bits, name_of(dtype) + (is_8bit ? " with codes" : ""));
}

PEFT_KERNELS_CASE(optimizer) {
  for (StepKind kind : {StepKind::kAdamW, StepKind::kAdam, StepKind::kLion}) {
    for (bool is_8bit : {false, true}) {
      for (DType dtype : kTypes) step(tested, dtype, kind, is_8bit, false, false);
      step(tested, DType::kBF16, kind, is_8bit, true, false);
      step(tested, DType::kBF16, kind, is_8bit, false, true);
    }
  }
}

}  // namespace peft_kernels::cpu::cases
