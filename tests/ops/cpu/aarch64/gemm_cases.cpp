// GEMMs, within the error bound, against fp64.
#include <cmath>
#include <cstring>

#include "cases.h"

namespace peft_kernels::cpu::cases {

// out[m, n] = bias + lhs . rhs^T (or lhs . rhs) + down . up^T in some rows, as in a layer with LoRA.
struct GemmCase {
  DType dtype;  // of lhs and of the output
  int64_t m, n, depth;
  int block_shift;  // of a packed rhs; 0: dense, -1: dense in fp32
  Form form;
  bool has_bias;
  int64_t rank;  // of a second term, in rows from 1 on; or 0
  bool by_columns;
  uint32_t threshold;  // of dropout on the second term
};

static std::string named(const GemmCase& p, const char* kernel) {
  return std::string(kernel) + " " + name_of(p.dtype) + " m" + std::to_string(p.m) + " n" +
         std::to_string(p.n) + " k" + std::to_string(p.depth) + " blocks 2^" + std::to_string(p.block_shift) +
         (p.block_shift > 0 ? " " + name_of(p.form) : "") + (p.rank ? " with LoRA" : "");
}

// Sums in fp32, eight at a time.
static float plain_dot(int64_t depth, const std::vector<float>& a, const std::vector<float>& b) {
  volatile float sums[8] = {};
  for (int64_t k = 0; k < depth; ++k) sums[k % 8] = sums[k % 8] + a[k] * b[k];
  float total = 0;
  for (float sum : sums) total += sum;
  return total;
}

static void run(const KernelTable& tested, const GemmCase& p) {
  const bool packed = p.block_shift > 0;
  const DType dense_type = p.block_shift < 0 ? DType::kF32 : p.dtype;
  const Array lhs = normal(p.dtype, p.m * p.depth, 1), dense = normal(dense_type, p.n * p.depth, 2),
              bias = normal(p.dtype, p.n, 3), down = normal(DType::kF32, p.m * p.rank, 4),
              up = normal(p.dtype, p.n * p.rank, 5);
  const Weight weight(p.n * p.depth, packed ? p.block_shift : 6, p.form, 6);
  const int64_t ld = p.by_columns ? p.n : p.depth;
  const MatrixView rhs{dense.data(), dense_type, ld, packed ? &weight.view : nullptr};
  const MatrixView up_view{up.data(), p.dtype, p.by_columns ? p.n : p.rank, nullptr};
  const DropoutMask mask{7, 1, p.threshold, 2.0f, p.n};
  const GemmTerm terms[2] = {
      {lhs.data(), p.dtype, p.depth, rhs, 1.0f, p.depth, 0, p.m, DropoutMask{}},
      {down.data(), DType::kF32, p.rank, up_view, 0.5f, p.rank, 1, p.m, p.rank ? mask : DropoutMask{}}};
  Array out(p.dtype, p.m * p.n);
  GemmParams params{};
  params.terms = terms;
  params.term_count = p.rank ? 2 : 1;
  params.bias = p.has_bias ? bias.data() : nullptr;
  params.bias_dtype = p.dtype;
  params.out = out.data();
  params.out_dtype = p.dtype;
  params.out_ld = p.n;
  params.m = p.m;
  params.n = p.n;

  Array kept(DType::kF32, p.m * p.n);
  for (int64_t i = 0; i < kept.size(); ++i) kept.set(i, 1.0);
  if (p.threshold) {
    const Array ones(kept);
    const DropoutParams dropout{ones.data(), DType::kF32, mask, kept.data()};
    scalar::kKernels.dropout(dropout, 0, kept.size());
  }
  std::vector<double> truth(p.m * p.n), plain(truth);
  std::vector<float> row(p.depth), exact(p.depth), given(p.depth);
  for (int64_t n = 0; n < p.n; ++n) {
    for (int64_t k = 0; k < p.depth; ++k) {
      const int64_t at = p.by_columns ? k * p.n + n : n * p.depth + k;
      exact[k] = packed ? weight.at(at) : dense.at(at);
      given[k] = static_cast<float>(packed ? rounded(exact[k], p.dtype) : exact[k]);
    }
    for (int64_t m = 0; m < p.m; ++m) {
      double sum = p.has_bias ? bias.at(n) : 0.0, delta = 0;
      for (int64_t k = 0; k < p.depth; ++k) {
        row[k] = lhs.at(m * p.depth + k);
        sum += double{row[k]} * exact[k];
      }
      for (int64_t r = 0; m > 0 && r < p.rank; ++r) {
        delta += 0.5 * down.at(m * p.rank + r) * up.at(p.by_columns ? r * p.n + n : n * p.rank + r);
      }
      delta *= kept.at(m * p.n + n);
      const double base = plain_dot(p.depth, row, given) + (p.has_bias ? bias.at(n) : 0.0f);
      truth[m * p.n + n] = sum + delta;
      plain[m * p.n + n] = rounded(base + delta, p.dtype);
    }
  }

  // Each in two tasks.
  if (p.by_columns) {
    const int64_t middle = p.n > 64 ? 64 : p.n;
    tested.gemm_nn(params, {0, p.m, 0, middle}, scratch());
    if (middle < p.n) tested.gemm_nn(params, {0, p.m, middle, p.n}, scratch());
    return within_policy(out, plain, truth, named(p, "nn"));
  }
  params.plan = tested.plan_nt(params);
  tested.gemm_nt(params, {0, p.m, 0, p.n}, scratch());
  within_policy(out, plain, truth, named(p, params.plan == NtPlan::kGemv ? "gemv" : "nt"));
  if (params.plan != NtPlan::kPairs && params.plan != NtPlan::kFloats) return;
  const bool pairs = params.plan == NtPlan::kPairs;
  const auto up_to = [](int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; };
  const Array buffer(pairs ? DType::kBF16 : DType::kF32, up_to(p.m, 16) * up_to(p.depth, kPackDepth));
  const PackParams pack{lhs.data(), p.dtype, p.m, p.depth, params.plan, buffer.data()};
  tested.pack_strips(pack, 0, up_to(p.m, kPackRows) / kPackRows);
  params.packed_lhs = buffer.data();
  params.packed_end = p.m;
  const Array again(out);
  memset(out.data(), 0xff, out.byte_count());
  const int64_t middle = p.n > 48 ? 48 : p.n;
  tested.gemm_packed(params, {0, p.m, 0, middle}, scratch());
  if (middle < p.n) tested.gemm_packed(params, {0, p.m, middle, p.n}, scratch());
  within_policy(out, plain, truth, named(p, pairs ? "pairs" : "floats"));
}

PEFT_KERNELS_CASE(gemm_nt) {
  constexpr Form kNf4 = Form::kNf4, kNested = Form::kNested;
  for (DType dtype : kTypes) {
    for (int64_t m : {1, 3, 4, 8, 9, 70}) {
      run(tested, {dtype, m, 67, 192, 6, m % 2 ? kNf4 : kNested, true, 0, false, 0});
      run(tested, {dtype, m, 12, 100, 6, kNf4, false, 8, false, 0});  // blocks cross rows
    }
    run(tested, {dtype, 5, 70, 320, 5, kNested, false, 8, false, 0});
    run(tested, {dtype, 33, 70, 608, 5, kNested, true, 8, false, 0});
    run(tested, {dtype, 17, 50, 96, 8, kNf4, true, 5, false, 0});
    for (int64_t m : {2, 21}) {
      run(tested, {dtype, m, 30, 83, 0, kNf4, true, 8, false, 0});
      run(tested, {dtype, m, 68, 32, 0, kNf4, false, 0, false, 0});  // thin
      run(tested, {dtype, m, 20, 70, -1, kNf4, false, 0, false, 0});
    }
  }
}

// Other codes than NF4's, and blocks of 32 and 16 with scales by a table, also where rows are no whole
// chunks.
PEFT_KERNELS_CASE(gemm_nt_formats) {
  for (DType dtype : kTypes) {
    for (int64_t m : {1, 3, 8, 9, 70}) {
      for (int shift : {4, 5}) {
        for (int64_t depth : {96, 160, 208, 1056}) {
          if (depth % (1 << shift) == 0) {
            run(tested, {dtype, m, 21, depth, shift, Form::kByTable, m == 3, m == 9 ? 8 : 0, false, 0});
          }
        }
      }
      run(tested, {dtype, m, 21, 320, 6, Form::kFp4, true, 0, false, 0});
    }
  }
}

PEFT_KERNELS_CASE(gemm_nn) {
  constexpr Form kNf4 = Form::kNf4, kNested = Form::kNested;
  for (DType dtype : kTypes) {
    for (int64_t m : {1, 7, 40}) {
      run(tested, {dtype, m, 192, 67, 6, m % 2 ? kNf4 : kNested, false, 0, true, 0});
      run(tested, {dtype, m, 128, 300, 5, kNested, false, 8, true, 1u << 31});
      run(tested, {dtype, m, 70, 35, 6, kNf4, false, 8, true, 0});  // blocks cross rows
      run(tested, {dtype, m, 90, 33, 0, kNf4, true, 0, true, 0});
      for (int shift : {4, 5}) run(tested, {dtype, m, 160, 67, shift, Form::kByTable, false, 8, true, 0});
      run(tested, {dtype, m, 48, 35, 4, Form::kByTable, false, 0, true, 0});
      run(tested, {dtype, m, 128, 35, 6, Form::kFp4, false, 0, true, 0});
    }
    run(tested, {dtype, 19, 66, 50, -1, kNf4, false, 0, true, 0});
  }
}

}  // namespace peft_kernels::cpu::cases
