// Chooses how grouped GEMMs of experts are computed, by shape and card.
#include <ATen/ATen.h>
// Ahead of all others: it is precompiled (tools/precompiled.py).

#include <torch/version.h>

#include <limits>
#include <stdexcept>

#include "../linear/crossovers.h"
#include "experts.h"

namespace peft_kernels::cuda {
namespace {

constexpr int kTileRows = 64;  // of a grouped GEMM

// Whether torch's grouped GEMM has a kernel. Where it has none it waits for the device, and multiplies one
// expert after the other. peft_kernels/nf4/grouped_linear.py has the same rule for dense layers.
bool has_grouped_gemm(DType dtype, const Card& card) {
#ifdef _WIN32
  return false;
#endif
  // For 10.3 it calls a kernel that is not compiled for it (torch 2.11). That for 10.0 is known from 2.11 on.
  constexpr bool kHas100 = TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 11;
  const int capability = card.compute_capability;
  return dtype == DType::kBF16 && (capability == 90 || (kHas100 && capability == 100));
}

// Whether torch's kernel and ours accept the shape.
bool takes(int64_t experts, int64_t rows, int64_t n, int64_t k) {
  constexpr int64_t kMostExperts = 1023, kMostRows = int64_t{1} << 30;
  // Whole vectors, also in the last piece of columns; 32-bit indices of vectors in a weight.
  return 0 < experts && experts <= kMostExperts && 0 < rows && rows < kMostRows && 0 < n && 0 < k &&
         n % 16 == 0 && k % 16 == 0 && n < kMostRows && k < kMostRows && n * k <= int64_t{1} << 34;
}

}  // namespace

ExpertsPlan plan_experts(bool is_dx, DType dtype, int64_t experts, int64_t rows, int64_t n, int64_t k,
                         int block_shift, bool is_aligned, const Card& card) {
  if (experts <= 0 || rows <= 0 || rows > std::numeric_limits<int>::max()) return {};
  // The numbers of rows are known on the device alone; the host knows their mean.
  const int64_t mean = ceil_div(rows, experts);
  const Crossover crossover = crossover_for(Gemms::kExperts, card, n * k);
  const bool takes_wgmma = (is_dx ? crossover.backward_wgmma : crossover.forward_wgmma).has(mean) &&
                           !is_off(card, is_dx ? "experts_dx_wgmma" : "experts_wgmma");
  if (is_aligned && takes_wgmma) {
    const int tile_rows = experts_wgmma_tile_rows(is_dx, dtype, experts, rows, n, k, block_shift, card);
    if (tile_rows > 0) return {ExpertsWay::kFused, tile_rows, true};
  }
  const auto tile_rows_of = is_dx ? experts_dx_tile_rows : experts_tile_rows;
  const bool is_usable = is_aligned && !is_off(card, is_dx ? "experts_dx_fused" : "experts_fused");
  const int tile_rows = is_usable ? tile_rows_of(dtype, experts, rows, n, k, block_shift, card) : 0;
  const ExpertsPlan grouped = plan_dense_experts(dtype, experts, rows, n, k, card);
  if (tile_rows == 0) return grouped;
  const bool fuses = mean <= (is_dx ? crossover.backward : crossover.forward);
  if (!fuses && grouped.way == ExpertsWay::kGrouped) return grouped;
  return {ExpertsWay::kFused, tile_rows};
}

int experts_wgmma_tile_rows(bool is_dx, DType dtype, int64_t experts, int64_t rows, int64_t n, int64_t k,
                            int block_shift, const Card& card) {
  // By the cost of an expert with the mean of rows, half a tile of padding included.
  constexpr int kMostInSmall = 104;
  const WgmmaShape shape{rows <= experts * kMostInSmall ? 64 : 128, is_dx};
  // Any number of rows will do: the conditions on one expert do not depend on it.
  if (!plan_linear(is_dx, dtype, shape.tokens, n, k, block_shift, card, Kernels::kWgmma).has_kernel())
    return 0;
  const int64_t tiles = ceil_div(is_dx ? k : n, int64_t{WgmmaShape::kFeatures}) *
                        ExpertRows::most_tiles(experts, rows, shape.tokens);
  return counts_fit(tiles * shape.tile_stages(n, k), experts, n, k, card) ? shape.tokens : 0;
}

#ifndef PEFT_KERNELS_WGMMA
void experts_wgmma(bool, const ExpertsParams&, Context&) {
  throw std::logic_error("ExpertsWgmma is not in this build");
}
#endif

ExpertsPlan plan_dense_experts(DType dtype, int64_t experts, int64_t rows, int64_t n, int64_t k,
                               const Card& card) {
  if (!has_grouped_gemm(dtype, card) || !takes(experts, rows, n, k)) return {};
  return {ExpertsWay::kGrouped, kTileRows};
}

}  // namespace peft_kernels::cuda
