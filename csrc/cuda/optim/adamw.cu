// Launches the optimizer kernels: the step, the clip factor, and copies of device tables.
#include <cstring>

#include "../core/launch.cuh"
#include "adamw.cuh"
#include "adamw_clip.cuh"

namespace peft_kernels::cuda {
namespace {

// For step.blocks > 0: as many blocks as are resident at once, each with a run of moment blocks; fewer if
// there is little work.
template <class Kernel>
int64_t grid_for(const Step& step, const Card& card) {
  return std::min(ceil_div(step.blocks, kStepWarps), int64_t{Kernel::kBlocksPerSm} * card.sms);
}

Shares shares_of(const Step& step, int64_t grid) {
  return {step.blocks / grid, static_cast<int>(step.blocks % grid)};
}

template <bool kLion>
void start(const Step& step, const float* factor, const Context& context) {
  using Kernel = AdamWStep<kLion>;
  const int64_t grid = grid_for<Kernel>(step, context.card);
  launch<Kernel>({step, shares_of(step, grid), factor}, grid, context.stream,
                 sizeof(typename Kernel::Shared));
}

// Writes the clip factor to `out`, or to workspace if null; returns where.
const float* start_clipping(const Step& step, float max_norm, float* out, Context& context) {
  const int64_t blocks = grid_for<ClipFactor>(step, context.card);
  auto* sums = static_cast<double*>(context.workspace((blocks + 1) * sizeof(double)));
  if (out == nullptr) out = reinterpret_cast<float*>(sums + blocks);
  launch<ClipFactor>({step, shares_of(step, blocks), max_norm, sums, out, context.counters(1)}, blocks,
                     context.stream, sizeof(ClipFactor::Shared));
  return out;
}

}  // namespace

void clip_factor(const Step& step, float max_norm, float* factor, Context& context) {
  start_clipping(step, max_norm, factor, context);
}

void adamw_step(const Step& step, bool is_lion, float max_norm, const float* factor, Context& context) {
  if (factor == nullptr && max_norm > 0) factor = start_clipping(step, max_norm, nullptr, context);
  is_lion ? start<true>(step, factor, context) : start<false>(step, factor, context);
}

void store_table(const uint64_t* words, int64_t count, uint64_t* out, Stream stream) {
  for (int64_t at = 0; at < count; at += StoreTable::kMost) {
    StoreTable::Params params{
        out + at, static_cast<int>(std::min<int64_t>(count - at, StoreTable::kMost)), {}};
    std::memcpy(params.words, words + at, params.count * sizeof(uint64_t));
    launch<StoreTable>(params, 1, stream);
  }
}

}  // namespace peft_kernels::cuda
