// The kernel table that each instruction set (ISA) fills, and which ISA is in use. An ISA is usable if it is
// in this build and this machine can run it; by default the best usable one is selected.
#pragma once

#include <cstdint>

#include "params.h"

namespace peft_kernels::cpu {

// Whether the compiler has a target pragma that neon_bf16 can be compiled with.
#if defined(__aarch64__) && defined(__GNUC__) && !defined(__clang__)
#  define PEFT_KERNELS_HAS_NEON_BF16 1
#else
#  define PEFT_KERNELS_HAS_NEON_BF16 0
#endif

// In ascending order: an ISA may use everything below it that is for the same kind of processor.
enum class Isa { kScalar, kNeon, kNeonBf16, kAvx2, kAvx512, kAvx512Bf16, kAmx, kAmxEmulated };
inline constexpr int kIsaCount = 7;  // without the last, which is for tests and is never selected by default

// The kernels of one ISA. A task's share of the work is given by `rect` or by a range [begin, end).
struct KernelTable {
  int64_t multiply_adds_per_thread;  // below this, waking a second thread costs more than it saves
  bool has_pairs;                    // whether a GEMM of bf16 with bf16 takes half the time
  int64_t tile_rows;                 // rows of lhs that gemm_nt and gemm_nn multiply together
  void (*quantize)(const QuantizeParams& params, int64_t block_begin, int64_t block_end);
  void (*quantize_absmax)(const AbsmaxParams& params, int64_t group_begin, int64_t group_end);
  void (*dequantize)(const Nf4View& weight, int64_t begin, int64_t end, DType dtype, void* out);
  // lhs [m, depth] times rhs [n, depth] transposed.
  void (*gemm_nt)(const GemmParams& params, const Rect& rect, void* scratch);
  // lhs [m, depth] times rhs [depth, n].
  void (*gemm_nn)(const GemmParams& params, const Rect& rect, void* scratch);
  // gemm_nt with the lhs of the first term packed and the other terms dense, in fp32, or in bf16 where the
  // ISA has pairs; used when plan_nt says so. pack_strips packs strips [begin, end).
  NtPlan (*plan_nt)(const GemmParams& params);
  void (*gemm_packed)(const GemmParams& params, const Rect& rect, void* scratch);
  void (*pack_strips)(const PackParams& params, int64_t begin, int64_t end);
  // Flat elements [begin, end).
  void (*dropout)(const DropoutParams& params, int64_t begin, int64_t end);
  void (*gated)(const GatedParams& params, int64_t begin, int64_t end);
  void (*gated_backward)(const GatedParams& params, int64_t begin, int64_t end);
  // Rows [begin, end), written to the start of `out`. Backward: `out` is scratch for two rows.
  void (*layer_norm)(const NormParams& params, int64_t begin, int64_t end);
  void (*layer_norm_backward)(const NormParams& params, int64_t begin, int64_t end);
  void (*bottleneck)(const BottleneckParams& params, int64_t begin, int64_t end);
  // Rows [begin, end) of x; begin is a multiple of kTransposeRows.
  void (*transpose_rows)(const TransposeParams& params, int64_t begin, int64_t end);
  // Columns [begin, end).
  void (*column_sums)(const ColumnSumsParams& params, int64_t begin, int64_t end);
  // Rows [begin, end); backward: columns, as it sums over rows.
  void (*scale_features)(const ScaleParams& params, int64_t begin, int64_t end);
  void (*scale_features_backward)(const ScaleParams& params, int64_t begin, int64_t end);
  // Rows [begin, end) of a tile of the logits.
  void (*softmax_tile)(const SoftmaxParams& params, int64_t begin, int64_t end);
  void (*softmax_dx)(const SoftmaxDxParams& params);
  void (*logit_gradients)(const LogitGradientParams& params, int64_t begin, int64_t end);
  // Rows [begin, end) of all heads; begin is a multiple of kAttentionPad. `workspace` has
  // attention_workspace_bytes bytes.
  int64_t (*attention_workspace_bytes)(const AttentionParams& params, bool is_backward);
  void (*attention)(const AttentionParams& params, int64_t begin, int64_t end, void* workspace);
  void (*attention_backward)(const AttentionParams& params, void* workspace);
  // Rows [begin, end). Backward: `sums` is for these rows alone.
  void (*rms_norm)(const RmsNormParams& params, int64_t begin, int64_t end);
  void (*add_rms_norm)(const RmsNormParams& params, int64_t begin, int64_t end);
  void (*rms_norm_backward)(const RmsNormParams& params, int64_t begin, int64_t end);
  // Elements [begin, end).
  void (*cast)(const CastParams& params, int64_t begin, int64_t end);
  // Tokens [begin, end) of all sequences.
  void (*rotary)(const RotaryParams& params, int64_t begin, int64_t end);
  // Elements [begin, end) of a parameter; begin is a multiple of kStateBlock.
  void (*step)(const StepParams& params, const StepTensor& tensor, int64_t begin, int64_t end);
  // The sum of (x[i] * factor)^2 over [begin, end).
  double (*squares)(const void* x, DType dtype, float factor, int64_t begin, int64_t end);
  // out[row] = the sum of squares in rows [begin, end) of a matrix with `cols` columns.
  void (*row_squares)(const MatrixView& matrix, int64_t cols, int64_t begin, int64_t end, float* out);
};

// Weak: the address is null where an ISA's file is not in the build.
#define PEFT_KERNELS_TABLE_OF(isa)                         \
  namespace isa {                                          \
  extern const KernelTable kKernels __attribute__((weak)); \
  }
PEFT_KERNELS_TABLE_OF(scalar)
PEFT_KERNELS_TABLE_OF(neon)
PEFT_KERNELS_TABLE_OF(neon_bf16)
PEFT_KERNELS_TABLE_OF(avx2)
PEFT_KERNELS_TABLE_OF(avx512)
PEFT_KERNELS_TABLE_OF(avx512_bf16)
PEFT_KERNELS_TABLE_OF(amx)
PEFT_KERNELS_TABLE_OF(amx_emulated)
#undef PEFT_KERNELS_TABLE_OF

// The name of an ISA that is usable; null otherwise.
const char* usable_isa_name(Isa isa);

// Why the processor's best ISA is not usable though the processor has it; null when it is usable.
const char* refused_isa_reason();

// The ISA in use.
const KernelTable& kernels();
const char* isa_name();

// Whether the ISA in use multiplies dense bf16 matrices as fast as torch does on this machine.
bool has_fast_dense();

// Returns false when `name` is not usable.
bool set_isa(const char* name);

// Selects the best usable ISA, capped by PEFT_KERNELS_CPU_ISA. Returns null, or what is wrong with that
// variable.
const char* select_isa_from_environment();

// This thread's scratch: kScratchBytes bytes, 64-byte aligned, kept until the thread ends, since fresh pages
// for each call would cost a small layer more than its arithmetic. Null when out of memory.
void* thread_scratch();

}  // namespace peft_kernels::cpu
