// All kernels of one ISA, written in terms of its vectors (vec_*.h). The order is that of the folders: each
// uses only those above it.
// clang-format off
#include "../core/lanes.inl"
#include "../core/transpose.inl"
#include "../core/column_sums.inl"
#include "../core/casts.inl"
#include "../core/philox.inl"
#include "../core/dynamic_codes.inl"
#include "../nf4/nf4_dequantize.inl"
#include "../nf4/nf4_quantize.inl"
#include "../nf4/nf4_absmax.inl"
#include "../linear/linear_tile.inl"
#include "../linear/linear_dot.inl"
#include "../linear/linear_outer.inl"
#if PEFT_KERNELS_TILES
#include "../linear/linear_tiles.inl"
#endif
#if PEFT_KERNELS_BF16_DOT
#include "../linear/linear_bf16.inl"
#endif
#include "../linear/linear_nt.inl"
#include "../linear/linear_nn.inl"
#include "../linear/linear_packed_units.inl"
#include "../linear/linear_packed.inl"
#include "../lora/dropout.inl"
#include "../lora/dora_scale.inl"
#include "../lora/dora_norm.inl"
#include "../gated/gated.inl"
#include "../bottleneck/bottleneck.inl"
#include "../loss/cross_entropy.inl"
#include "../block/attention.inl"
#include "../block/attention_backward.inl"
#include "../block/rms_norm.inl"
#include "../block/rotary.inl"
#include "../optim/adamw.inl"
// clang-format on

// constexpr, so that no code of this ISA runs when the library is loaded.
constexpr KernelTable kKernels = {
    kMultiplyAddsPerThread,
    PEFT_KERNELS_BF16_DOT != 0,
    OuterBF16::kTileRows,
    quantize,
    quantize_absmax,
    dequantize,
    gemm_nt,
    gemm_nn,
    plan_nt,
    gemm_packed,
    pack_strips,
    dropout,
    gated,
    gated_backward,
    layer_norm,
    layer_norm_backward,
    bottleneck,
    transpose_rows,
    column_sums,
    scale_features,
    scale_features_backward,
    softmax_tile,
    softmax_dx,
    logit_gradients,
    attention_workspace_bytes,
    attention,
    attention_backward,
    rms_norm,
    add_rms_norm,
    rms_norm_backward,
    cast,
    rotary,
    step,
    squares,
    row_squares,
};
