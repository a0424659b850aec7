// Everything that a level compiles, in the order of use. Expects the level's vectors.
// clang-format off
#include "lanes.inl"
#include "nf4_dequantize.inl"
#include "nf4_quantize.inl"
#include "linear_tile.inl"
#include "linear_dot.inl"
#include "linear_outer.inl"
#if PEFT_KERNELS_TILES
#include "linear_tiles.inl"
#endif
#if PEFT_KERNELS_BF16_DOT
#include "linear_bf16.inl"
#endif
#include "dropout.inl"
#include "linear_nt.inl"
#include "linear_nn.inl"
#include "linear_packed_units.inl"
#include "linear_packed.inl"
#include "gated.inl"
#include "transpose.inl"
#include "bottleneck.inl"
#include "dora_scale.inl"
#include "dora_norm.inl"
#include "cross_entropy.inl"
#include "attention.inl"
#include "attention_backward.inl"
#include "rms_norm.inl"
#include "casts.inl"
#include "rotary.inl"
#include "dynamic_codes.inl"
#include "adamw.inl"
// clang-format on

// A constant, so that nothing of the level runs when the library is loaded.
constexpr KernelTable kKernels = {
    kMultiplyAddsPerThread,
    PEFT_KERNELS_BF16_DOT != 0,
    quantize,
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
    softmax_piece,
    softmax_slope,
    softmax_slopes,
    attention_bytes,
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
