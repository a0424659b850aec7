// Everything that a level compiles, in the order of use. Expects the level's vectors and
// PEFT_KERNELS_BF16_DOT, PEFT_KERNELS_TILES.
// clang-format off
#include "dequantize.inl"
#include "quantize.inl"
#include "tile.inl"
#include "dot.inl"
#include "outer.inl"
#if PEFT_KERNELS_TILES
#include "tiles.inl"
#endif
#if PEFT_KERNELS_BF16_DOT
#include "bf16.inl"
#endif
#include "dropout.inl"
#include "gemm_nt.inl"
#include "gemm_nn.inl"
#include "packed_units.inl"
#include "gemm_packed.inl"
#include "gated.inl"
#include "scale.inl"
// clang-format on
