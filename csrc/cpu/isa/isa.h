// Instruction-set levels: which exist in this build, which this machine can run, which one is in use.
#pragma once

#include <cstdint>

#include "params.h"

namespace peft_kernels::cpu {

// Whether the compiler knows a pragma that level neon_bf16 can be compiled under.
#if defined(__aarch64__) && defined(__GNUC__) && !defined(__clang__)
#  define PEFT_KERNELS_HAS_NEON_BF16 1
#else
#  define PEFT_KERNELS_HAS_NEON_BF16 0
#endif

// Ascending: a level may use everything below it that is for the same processors.
enum class Isa { kScalar, kNeon, kNeonBf16, kAvx2, kAvx512, kAvx512Bf16, kAmx, kAmxEmulated };
inline constexpr int kIsaCount = 7;  // without the last, which is for tests and never chosen by itself

// What an ISA file exports. `rect` and the block or element range pick the part a task owns.
struct KernelTable {
  int64_t multiply_adds_per_thread;  // below which a second thread costs more to wake than it saves
  bool has_pairs;                    // whether products of bf16 with bf16 take half the time
  void (*quantize)(const QuantizeParams& params, int64_t block_begin, int64_t block_end);
  void (*dequantize)(const Nf4View& weight, int64_t begin, int64_t end, DType dtype, void* out);
  // lhs [m, depth] times rhs [n, depth], transposed.
  void (*gemm_nt)(const GemmParams& params, const Rect& rect, void* scratch);
  // lhs [m, depth] times rhs [depth, n].
  void (*gemm_nn)(const GemmParams& params, const Rect& rect, void* scratch);
  // gemm_nt with the lhs of the first term packed, the others dense, in fp32 or where there are pairs in
  // bf16, for the products of which plan_nt says so. pack_strips: strips [begin, end).
  NtPlan (*plan_nt)(const GemmParams& params);
  void (*gemm_packed)(const GemmParams& params, const Rect& rect, void* scratch);
  void (*pack_strips)(const PackParams& params, int64_t begin, int64_t end);
  // Flat elements [begin, end).
  void (*dropout)(const DropoutParams& params, int64_t begin, int64_t end);
  void (*gated)(const GatedParams& params, int64_t begin, int64_t end);
  void (*gated_backward)(const GatedParams& params, int64_t begin, int64_t end);
  // Rows [begin, end), the first of which goes to the beginning of `out`; backward: `out` has room for two.
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
  // Rows [begin, end) of a piece.
  void (*softmax_piece)(const SoftmaxParams& params, int64_t begin, int64_t end);
  void (*softmax_slope)(const SlopeParams& params);
  void (*softmax_slopes)(const SlopesParams& params, int64_t begin, int64_t end);
  // Rows [begin, end) of all heads, begin a multiple of kAttentionPad. `room` has the bytes that are asked
  // for.
  int64_t (*attention_bytes)(const AttentionParams& params, bool is_backward);
  void (*attention)(const AttentionParams& params, int64_t begin, int64_t end, void* room);
  void (*attention_backward)(const AttentionParams& params, void* room);
  // Rows [begin, end); backward: `sums` is of these alone.
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

namespace scalar {
extern const KernelTable kKernels;
}
namespace neon {
extern const KernelTable kKernels;
}
namespace neon_bf16 {
extern const KernelTable kKernels;
}
namespace avx2 {
extern const KernelTable kKernels;
}
namespace avx512 {
extern const KernelTable kKernels;
}
namespace avx512_bf16 {
extern const KernelTable kKernels;
}
namespace amx {
extern const KernelTable kKernels;
}
namespace amx_emulated {
extern const KernelTable kKernels;
}

// Name of a level that is built and that this machine, and its operating system, can run; null otherwise.
const char* usable_isa_name(Isa isa);

// Why the best level of this machine is not in use though its processor has it; null when it is, or has not.
const char* refused_isa_reason();

// The level in use.
const KernelTable& kernels();
const char* isa_name();

// Whether the level in use multiplies dense bf16 matrices as fast as torch does on this machine.
bool has_fast_dense();

// False when `name` is not a usable level.
bool set_isa(const char* name);

// The best usable level, capped by PEFT_KERNELS_CPU_ISA. Returns null, or what is wrong with that variable.
const char* select_isa_from_environment();

// This thread's scratch, kScratchBytes long, 64-byte aligned, kept until the thread ends: fresh pages for
// each call would cost a small layer more than its arithmetic. Null when memory is exhausted.
void* thread_scratch();

}  // namespace peft_kernels::cpu
