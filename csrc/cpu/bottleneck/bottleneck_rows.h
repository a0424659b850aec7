// A bottleneck adapter's checked arguments, and its forward and backward steps on blocks of rows.
#pragma once

#include <ATen/ATen.h>

#include <algorithm>

#include "../../common/bottleneck_args.h"
#include "../core/transpose.h"
#include "../linear/linear_gemm.h"
#include "../lora/dropout.h"

namespace peft_kernels::cpu {

// Rows that go through the bottleneck together: the hidden values stay in L2.
inline constexpr int64_t kLeastRows = 16, kMostRows = 128;

// The arguments common to both directions, converted for these kernels.
struct BottleneckArgs : peft_kernels::BottleneckArgs {
  Tensor norm_weight, norm_bias;  // in fp32, or undefined
  float norm_eps;
  DropoutMask mask;

  BottleneckArgs(const Tensor& x, const OptionalTensor& norm_weight_in, const OptionalTensor& norm_bias_in,
                 double norm_eps, const Tensor& down, const Tensor& up, c10::string_view activation,
                 double scaling, double dropout_p, const OptionalTensor& seed)
      : peft_kernels::BottleneckArgs(x, norm_weight_in, norm_bias_in, down, up, activation, scaling,
                                     dropout_p, seed),
        norm_weight(floats_of(norm_weight_in, k, "norm_weight")),
        norm_bias(floats_of(norm_bias_in, k, "norm_bias")),
        norm_eps(static_cast<float>(norm_eps)),
        mask(mask_of(dropout, seed, r)) {}

  // A small parameter times `scale` in fp32; undefined if there is none. Converted by our own kernel: torch's
  // conversions take longer than a row through the bottleneck.
  Tensor floats_of(const OptionalTensor& t, int64_t size, const char* name, float scale = 1.0f) const {
    const Tensor checked = checked_vector(t, size, name);
    if (!checked.defined() || (scale == 1.0f && checked.scalar_type() == at::kFloat)) return checked;
    Tensor out = at::empty({size}, floats());
    kernels().column_sums(
        {checked.const_data_ptr(), dtype_of(checked, name), 1, size, scale, out.mutable_data_ptr<float>()}, 0,
        size);
    return out;
  }

  bool has_norm() const { return norm_weight.defined(); }
  // Whether activations are multiplied with a parameter in bf16 pairs: then no result is more precise than
  // bf16.
  bool in_pairs(const Tensor& parameter) const {
    return kernels().has_pairs && x.scalar_type() == at::kBFloat16 &&
           parameter.scalar_type() == at::kBFloat16;
  }

  NormParams norm() const {
    NormParams params{};
    params.x = x.const_data_ptr();
    params.dtype = dtype_of(x, "x");
    params.features = k;
    params.weight = norm_weight.const_data_ptr<float>();
    params.bias = norm_bias.defined() ? norm_bias.const_data_ptr<float>() : nullptr;
    params.eps = norm_eps;
    return params;
  }
};

inline const float* data_of(const Tensor& t) { return t.defined() ? t.const_data_ptr<float>() : nullptr; }

// The operands and the output of a GEMM with a block of rows.
struct RowGemm {
  const void* rows;
  DType dtype;
  const Tensor& rhs;  // [n, depth]; [depth, n] for by_columns
  const char* name;
  void* out;
  DType out_dtype;
  const float* bias = nullptr;
  const void* residual = nullptr;
};

// The first `rows` of a GEMM of `m` rows, in one task: out = rows . rhs^T + bias, or rows . rhs.
inline void multiply(const RowGemm& gemm, int64_t rows, int64_t m, bool by_columns, void* scratch) {
  const int64_t depth = gemm.rhs.size(by_columns ? 0 : 1), n = gemm.rhs.size(by_columns ? 1 : 0);
  const GemmTerm term{gemm.rows, gemm.dtype, depth, dense_matrix(gemm.rhs, gemm.name), 1.0f, depth, 0, rows};
  GemmParams params = one_term_params(term, m, n, gemm.out, gemm.out_dtype);
  params.bias = gemm.bias;
  params.bias_dtype = DType::kF32;
  params.residual = gemm.residual;
  (by_columns ? kernels().gemm_nn : kernels().gemm_nt)(params, {0, rows, 0, n}, scratch);
}

// Rows that one task takes through the bottleneck at once: a power of two, so that no chunk is split. Results
// do not depend on it.
inline int64_t block_of(int64_t m, int64_t threads) {
  int64_t block = kLeastRows;
  while (block < kMostRows && block * threads < m) block *= 2;
  return block;
}

// Buffers for the hidden values of a block of rows.
struct HiddenBuffers {
  Tensor value, rounded;
  BottleneckParams params;

  // For `rows` rows; in fp32, or rounded for a GEMM in pairs.
  HiddenBuffers(const BottleneckArgs& args, const Tensor& z, int64_t rows, bool wants_value,
                bool rounds_value)
      : params{} {
    params.z = z.const_data_ptr<float>();
    params.activation = args.activation;
    params.mask = args.mask;
    params.scaling = args.scaling;
    if (wants_value) {
      value = at::empty({rows * args.r}, args.floats());
      params.value = value.mutable_data_ptr<float>();
    }
    if (rounds_value) params.rounded_value = round_into(rounded, args, rows);
  }
  static BF16* round_into(Tensor& buffer, const BottleneckArgs& args, int64_t rows) {
    buffer = at::empty({rows * args.r}, args.floats().dtype(at::kBFloat16));
    return static_cast<BF16*>(buffer.mutable_data_ptr());
  }
};

// The forward of all rows. The arguments must outlive it.
class BottleneckForward {
 public:
  // Writes y and z, which are contiguous; y has residual's shape, or x's.
  BottleneckForward(const BottleneckArgs& args, const OptionalTensor& residual,
                    const OptionalTensor& down_bias, const OptionalTensor& up_bias, Tensor& y, Tensor& z)
      : args_(args),
        down_bias_(args.floats_of(down_bias, args.r, "down_bias")),
        up_bias_(args.floats_of(up_bias, args.n, "up_bias", args.scaling)),
        y_(y),
        z_(z) {
    if (!residual) args.check_residual_shape();
    residual_ = residual ? matching(*residual, y, "residual") : args.x;
  }

  // For few rows the cost is reading the parameters from memory.
  int64_t multiply_adds() const { return (args_.m + kDecodeRows) * args_.r * (args_.k + args_.n); }

  void run() const {
    const int64_t threads = useful_threads(multiply_adds());
    const int64_t block = block_of(args_.m, threads), blocks = ceil_div(args_.m, block);
    parallel_for(0, blocks, ceil_div(blocks, threads),
                 [&](int64_t first, int64_t last) { run_blocks(block, first, last); });
  }

 private:
  void run_blocks(int64_t block, int64_t first, int64_t last) const {
    void* scratch = checked_thread_scratch();
    const DType dtype = dtype_of(args_.x, "x");
    const bool in_pairs = args_.in_pairs(args_.up), has_norm = args_.has_norm();
    const HiddenBuffers hidden(args_, z_, block, !in_pairs, in_pairs);
    const Tensor& value = in_pairs ? hidden.rounded : hidden.value;
    Tensor normed;
    if (has_norm) normed = at::empty({block * args_.k}, args_.floats());
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = i * block, end = std::min(begin + block, args_.m), rows = end - begin;
      const void* in = element_ptr(args_.x, begin * args_.k);
      if (has_norm) {
        NormParams norm = args_.norm();
        norm.out = normed.mutable_data_ptr<float>();
        kernels().layer_norm(norm, begin, end);
        in = norm.out;
      }
      multiply({in, has_norm ? DType::kF32 : dtype, args_.down, "down",
                mutable_element_ptr(z_, begin * args_.r), DType::kF32, data_of(down_bias_)},
               rows, args_.m, false, scratch);
      kernels().bottleneck(hidden.params, begin * args_.r, end * args_.r);
      multiply({value.const_data_ptr(), dtype_of(value, "value"), args_.up, "up",
                mutable_element_ptr(y_, begin * args_.n), dtype, data_of(up_bias_),
                element_ptr(residual_, begin * args_.n)},
               rows, args_.m, false, scratch);
    }
  }

  const BottleneckArgs& args_;
  Tensor down_bias_, up_bias_, residual_, y_, z_;
};

// The hidden values, or their gradient, of all rows, transposed chunk by chunk: [columns][rows of the chunk].
// The gradients of `down` and `up` are GEMMs with it that sum over all rows.
class GradientFactors {
 public:
  GradientFactors(const BottleneckArgs& args, bool wanted, bool in_pairs) : m_(args.m), r_(args.r) {
    if (wanted) t_ = at::empty({m_ * r_}, args.floats().dtype(in_pairs ? at::kBFloat16 : at::kFloat));
  }
  // Rows [begin, end) of one chunk.
  void put(const float* rows, int64_t begin, int64_t end) {
    if (!t_.defined()) return;
    const int64_t chunk = begin / kChunkRows * kChunkRows;
    void* out = mutable_element_ptr(t_, chunk * r_ + begin - chunk);
    const TransposeParams params{rows,
                                 DType::kF32,
                                 end - begin,
                                 r_,
                                 r_,
                                 out,
                                 dtype_of(t_, "factors"),
                                 std::min(kChunkRows, m_ - chunk)};
    kernels().transpose_rows(params, 0, end - begin);
  }
  // [columns, columns of other], written to `out`.
  Gemm gemm_with(const Tensor& other, Tensor& out) {
    Gemm gemm(out);
    gemm.add_row_sums(t_, r_, other, 0, m_);
    return gemm;
  }

 private:
  static_assert(kChunkRows % kMostRows == 0, "");

  int64_t m_, r_;
  Tensor t_;
};

}  // namespace peft_kernels::cpu
