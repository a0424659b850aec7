// Plans LinearWgmma, the GEMM for compute capability 9.0.
#include <algorithm>
#include <stdexcept>

#include "crossovers.h"
#include "linear.h"

namespace peft_kernels::cuda {
namespace {

// Whether this library has the kernel: a build without code for 9.0 does not.
#ifdef PEFT_KERNELS_WGMMA
constexpr bool kIsBuilt = true;
#else
constexpr bool kIsBuilt = false;
#endif

constexpr int kTokens[] = {64, 128, 256};

}  // namespace

LinearPlan plan_wgmma(bool is_dx, int64_t m, int64_t n, int64_t k, const Card& card) {
  if (!kIsBuilt || card.compute_capability != 90 || !has_wide_table(card)) return {};
  constexpr const char* kNames[][3] = {{"wgmma64", "wgmma128", "wgmma256"},
                                       {"dx_wgmma64", "dx_wgmma128", "dx_wgmma256"}};
  LinearPlan best;
  int64_t least = 0;
  for (int i = 0; i < 3; ++i) {
    const WgmmaShape shape{kTokens[i], is_dx};
    if (shape.end() > card.shared_bytes + card.reserved_bytes || is_off(card, kNames[is_dx][i])) continue;
    const int64_t cost = shape.share(m, n, k, card).cost;
    // Of equal cost, more tokens: fewer instructions, and less of the weight is read again.
    if (best.has_kernel() && cost > least) continue;
    least = cost;
    best = {kNames[is_dx][i], shape, shape.cut(m, n, k, card)};
  }
  return best.cut.units < int64_t{1} << 30 ? best : LinearPlan{};
}

int64_t WgmmaShape::tiles(int64_t m, int64_t n, int64_t k) const {
  return ceil_div(is_dx ? k : n, int64_t{kFeatures}) * ceil_div(m, int64_t{tokens});
}

WgmmaShape::Share WgmmaShape::share(int64_t m, int64_t n, int64_t k, const Card& card) const {
  const int64_t all = tiles(m, n, k), stages = tile_stages(n, k);
  const int64_t whole = ceil_div(all, card.sms) * stages, equal = ceil_div(all * stages, card.sms);
  return equal + kSharingStages < whole ? Share{equal, (equal + kSharingStages) * stage_cost()}
                                        : Share{whole, whole * stage_cost()};
}

Cut WgmmaShape::cut(int64_t m, int64_t n, int64_t k, const Card& card) const {
  const Share share = this->share(m, n, k, card);
  Cut cut;
  cut.tiles = tiles(m, n, k);
  cut.part = static_cast<int>(share.stages);
  cut.units = cut.tiles * tile_stages(n, k);
  cut.blocks = ceil_div(cut.units, share.stages);
  cut.shared_bytes = end();
  if (share.stages % tile_stages(n, k) != 0) {
    cut.counters = cut.tiles;
    cut.workspace_bytes = 2 * cut.blocks * kFeatures * tokens * 4;
  }
  return cut;
}

Load WgmmaShape::load(const Cut& cut) const { return {kFeatures, tokens, kDepth, cut.part, 1}; }

#ifndef PEFT_KERNELS_WGMMA
void start_kernel(const WgmmaShape&, const Cut&, const LinearParams&, Context&) {
  throw std::logic_error("LinearWgmma is not in this build");
}
#endif

}  // namespace peft_kernels::cuda
