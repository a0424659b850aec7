// Instruction-set levels: which exist in this build, which this machine can run, which one is in use.
#pragma once

#include <cstdint>

#include "params.h"

namespace peft_kernels::cpu {

// Ascending: a level may use everything below it.
enum class Isa { kScalar, kAvx2, kAvx512, kAvx512Bf16, kAmx, kAmxEmulated };
inline constexpr int kIsaCount = 5;  // without the last, which is for tests and never chosen by itself

// What an ISA file exports. `rect` and the block or element range pick the part a task owns.
struct KernelTable {
  const char* name;
  int64_t multiply_adds_per_thread;  // below which a second thread costs more to wake than it saves
  void (*quantize)(const QuantizeParams& params, int64_t block_begin, int64_t block_end);
  void (*dequantize)(const Nf4View& weight, int64_t begin, int64_t end, DType dtype, void* out);
  // lhs [m, depth] times rhs [n, depth], transposed.
  void (*gemm_nt)(const GemmParams& params, const Rect& rect, void* scratch);
  // lhs [m, depth] times rhs [depth, n].
  void (*gemm_nn)(const GemmParams& params, const Rect& rect, void* scratch);
  // gemm_nt with the lhs of the first term packed, the others fp32 and dense, for the products of which
  // plan_nt says so. pack_strips: strips [begin, end).
  NtPlan (*plan_nt)(const GemmParams& params);
  void (*gemm_packed)(const GemmParams& params, const Rect& rect, void* scratch);
  void (*pack_strips)(const PackParams& params, int64_t begin, int64_t end);
  bool has_bf16_dot;  // products of pairs of bf16
  // Flat elements [begin, end).
  void (*dropout)(const DropoutParams& params, int64_t begin, int64_t end);
  void (*gated)(const GatedParams& params, int64_t begin, int64_t end);
  void (*gated_backward)(const GatedParams& params, int64_t begin, int64_t end);
  // Rows [begin, end); backward: columns, as it sums over rows.
  void (*scale_features)(const ScaleParams& params, int64_t begin, int64_t end);
  void (*scale_features_backward)(const ScaleParams& params, int64_t begin, int64_t end);
  // out[row] = the sum of squares in rows [begin, end) of a matrix with `cols` columns.
  void (*row_squares)(const MatrixView& matrix, int64_t cols, int64_t begin, int64_t end, float* out);
};

// The table of a level, from the functions in its namespace.
#define PEFT_KERNELS_TABLE(level)  \
  {#level,                         \
   level::kMultiplyAddsPerThread,  \
   level::quantize,                \
   level::dequantize,              \
   level::gemm_nt,                 \
   level::gemm_nn,                 \
   level::plan_nt,                 \
   level::gemm_packed,             \
   level::pack_strips,             \
   PEFT_KERNELS_BF16_DOT,          \
   level::dropout,                 \
   level::gated,                   \
   level::gated_backward,          \
   level::scale_features,          \
   level::scale_features_backward, \
   level::row_squares}

extern const KernelTable kScalarKernels;
#if defined(__x86_64__)
extern const KernelTable kAvx2Kernels;
extern const KernelTable kAvx512Kernels;
extern const KernelTable kAvx512Bf16Kernels;
extern const KernelTable kAmxKernels;
#  if PEFT_KERNELS_EMULATE
extern const KernelTable kAmxEmulatedKernels;
#  endif
#endif

// Name of a level that is built and that this machine, and its operating system, can run; null otherwise.
const char* usable_isa_name(Isa isa);

// Why the best level of this machine is not in use though its processor has it; null when it is, or has not.
const char* refused_isa_reason();

const KernelTable& kernels();

// Whether the level in use multiplies dense bf16 matrices as fast as torch does on this machine: not where
// torch has tiles (AMX).
bool has_fast_dense();

// False when `name` is not a usable level.
bool set_isa(const char* name);

// The best usable level, capped by PEFT_KERNELS_CPU_ISA. Returns null, or what is wrong with that variable.
const char* select_isa_from_environment();

// This thread's scratch, kScratchBytes long, 64-byte aligned, kept until the thread ends: fresh pages for
// each call would cost a small layer more than its arithmetic. Null when memory is exhausted.
void* thread_scratch();

}  // namespace peft_kernels::cpu
