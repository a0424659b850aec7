// Chooses the kernel of an NF4 GEMM by shape and card, and partitions its work.
#include <algorithm>
#include <limits>

#include "crossovers.h"
#include "linear.h"

namespace peft_kernels::cuda {
namespace {

// Classes of cards by shared memory, which decides the table of pairs.
enum class Cards { kWide, kNarrow, kAny };

bool belongs(const Card& card, Cards cards) {
  const bool wide = has_wide_table(card);
  switch (cards) {
    case Cards::kWide:
      return wide;
    case Cards::kNarrow:
      return !wide && card.shared_bytes >= 99 << 10;
    default:
      return card.shared_bytes >= 99 << 10;
  }
}

struct Rule {
  const char* name;
  Cards cards;
  int64_t max_m;
  decltype(LinearPlan::shape) shape;
};

constexpr int64_t kAnyRows = std::numeric_limits<int64_t>::max();

// The first rule that fits is used.
constexpr Rule kLinearRules[] = {
    {"small8", Cards::kWide, 8, SmallShape{1, 1, true}},
    {"small16", Cards::kWide, 16, SmallShape{2, 2, true}},
    {"small32", Cards::kWide, 32, SmallShape{4, 2, true}},
    {"tiles256", Cards::kWide, kAnyRows, TileShape{8, true}},
    {"tiles128", Cards::kWide, kAnyRows, TileShape{4, true}},
    {"small8_narrow", Cards::kNarrow, 8, SmallShape{1, 1, false}},
    {"small16_narrow", Cards::kNarrow, 16, SmallShape{2, 2, false}},
    {"small32_narrow", Cards::kNarrow, 32, SmallShape{4, 2, false}},
    {"tiles256_narrow", Cards::kNarrow, kAnyRows, TileShape{8, false}},
    {"tiles128_narrow", Cards::kNarrow, kAnyRows, TileShape{4, false}},
};
// Of weights with scale codes.
constexpr Rule kScaleCodeRules[] = {
    {"small8_codes", Cards::kWide, 8, SmallShape{1, 1, true, true}},
    {"small16_codes", Cards::kWide, 16, SmallShape{2, 2, true, true}},
    {"small32_codes", Cards::kWide, 32, SmallShape{4, 2, true, true}},
    {"small8_codes_narrow", Cards::kNarrow, 8, SmallShape{1, 1, false, true}},
    {"small16_codes_narrow", Cards::kNarrow, 16, SmallShape{2, 2, false, true}},
    {"small32_codes_narrow", Cards::kNarrow, 32, SmallShape{4, 2, false, true}},
};
// Beyond one token tile the weight is decoded once per tile.
constexpr Rule kDxRules[] = {
    {"dx8", Cards::kWide, 8, DxShape{1, true}},
    {"dx16", Cards::kWide, 16, DxShape{2, true}},
    {"dx32", Cards::kWide, 32, DxShape{4, true}},
    {"dx8_narrow", Cards::kNarrow, 8, DxShape{1, false}},
    {"dx16_narrow", Cards::kNarrow, 16, DxShape{2, false}},
    {"dx32_narrow", Cards::kAny, 32, DxShape{4, false}},
    {"dx64", Cards::kWide, kAnyRows, DxShape{8, false}},
    {"dx32_narrow", Cards::kNarrow, kAnyRows, DxShape{4, false}},
};

constexpr int64_t kMost = int64_t{1} << 30;  // of 32-bit indices

// Whether rows consist of whole groups, with 32-bit indices.
bool has_groups(int64_t m, int64_t n, int64_t k, const Card& card) {
  return card.compute_capability >= 80 && m > 0 && n > 0 && k > 0 && k % kGroup == 0 && m < kMost &&
         n < kMost && k < kMost && n * k / kGroup < int64_t{1} << 32;
}
// Whether groups have whole scales, too, and rows of dY can be copied in vectors of 16 bytes.
bool takes(bool is_dx, DType dtype, int64_t m, int64_t n, int64_t k, int block_shift, const Card& card) {
  return (!is_dx || n % 8 == 0) && dtype != DType::kF32 && has_groups(m, n, k, card) &&
         (1 << block_shift) % kGroup == 0 && k % (1 << block_shift) == 0;
}

// Places x, the larger array, and the fixed-size data; returns the bytes available for x.
int64_t place(bool wide_table, int64_t fixed_bytes, const Card& card, Cut& cut) {
  if (!wide_table) {
    cut.shared_offset = kNarrowTableBytes;
    cut.x_offset = cut.shared_offset + static_cast<int>(fixed_bytes);
    return card.shared_bytes - cut.x_offset;
  }
  const int64_t before = kWideTableAddress - card.reserved_bytes;
  const int64_t behind = card.shared_bytes - kBehindWideTable;
  const bool x_behind = behind > before;
  cut.x_offset = x_behind ? kBehindWideTable : 0;
  cut.shared_offset = x_behind ? 0 : kBehindWideTable;
  if (std::min(behind, before) < fixed_bytes) return 0;
  return std::max(behind, before);
}

// A block's total shared memory for `x_bytes` of x.
int64_t shared_bytes(bool wide_table, int64_t x_bytes, int64_t fixed_bytes, const Cut& cut) {
  return std::max<int64_t>({cut.x_offset + x_bytes, cut.shared_offset + fixed_bytes,
                            wide_table ? kBehindWideTable : kNarrowTableBytes});
}

}  // namespace

Cut SmallShape::cut(int64_t m, int64_t n, int64_t k, const Card& card) const {
  Cut cut;
  const int64_t available = place(wide_table, fixed_bytes(), card, cut);
  const int64_t most_groups = (available / (2 * x_rows(m)) - kPad) / kGroup;
  if (most_groups < 1) return {};

  // Slices of k that fit, or up to twice as many where that divides the multiprocessors more evenly.
  const int64_t groups = k / kGroup, least_splits = ceil_div(groups, most_groups);
  cut.tiles = ceil_div(n, rows());
  for (int64_t splits = least_splits; splits <= std::min(2 * least_splits, groups); ++splits) {
    const int64_t units = cut.tiles * ceil_div(groups, splits);
    const int64_t workers = std::max<int64_t>(1, card.sms / splits) * kWarps;
    const int64_t part = ceil_div(units, workers);
    if (cut.part != 0 && part >= cut.part) continue;
    cut.splits = static_cast<int>(splits);
    cut.part = static_cast<int>(part);
    cut.units = units;
  }
  cut.blocks = cut.splits * ceil_div(cut.units, kWarps * cut.part);
  cut.shared_bytes = shared_bytes(wide_table, x_bytes(m, ceil_div(groups, cut.splits)), fixed_bytes(), cut);
  const bool shares_tiles = cut.splits > 1 || kWarps * cut.part % groups != 0;
  if (shares_tiles) {
    cut.counters = cut.tiles;
    cut.workspace_bytes = (cut.splits * cut.tiles + cut.blocks) * rows() * tokens() * 4;
  }
  return cut;
}

Cut DxShape::cut(int64_t m, int64_t n, int64_t k, const Card& card) const {
  Cut cut;
  const int64_t x_bytes = stages() * stage_bytes();
  if (place(wide_table, fixed_bytes(), card, cut) < x_bytes) return {};
  cut.shared_bytes = shared_bytes(wide_table, x_bytes, fixed_bytes(), cut);
  const int64_t halves = 2 * ceil_div(n, kRows);
  cut.tiles = ceil_div(k, kColumns) * ceil_div(m, tokens());
  cut.units = cut.tiles * halves;
  cut.part = static_cast<int>(ceil_div(cut.units, card.sms));
  cut.blocks = ceil_div(cut.units, cut.part);
  if (cut.part % halves != 0) {
    cut.counters = cut.tiles;
    cut.workspace_bytes = cut.blocks * 2 * tokens() * kColumns * 4;
  }
  return cut;
}

int64_t TileShape::tiles(int64_t m, int64_t n) const { return ceil_div(n, rows()) * ceil_div(m, kTokens); }

TileShape::Share TileShape::share(int64_t m, int64_t n, int64_t k, const Card& card) const {
  const int64_t stages = ceil_div(k, depth());
  const int64_t whole = ceil_div(tiles(m, n), card.sms) * stages;
  const int64_t equal = ceil_div(tiles(m, n) * stages, card.sms);
  return equal + sharing_stages() < whole ? Share{equal, (equal + sharing_stages()) * stage_cost()}
                                          : Share{whole, whole * stage_cost()};
}

Cut TileShape::cut(int64_t m, int64_t n, int64_t k, const Card& card) const {
  const Share share = this->share(m, n, k, card);
  // Prefers the smaller tiles where they finish sooner.
  if (depth_warps() == 1 && TileShape{kWarps / 2, wide_table}.share(m, n, k, card).cost < share.cost)
    return {};
  const int64_t stages = ceil_div(k, depth());
  Cut cut;
  cut.tiles = tiles(m, n);
  cut.part = static_cast<int>(share.stages);
  cut.units = cut.tiles * stages;
  cut.blocks = ceil_div(cut.units, share.stages);
  cut.shared_bytes = wide_table ? kBehindWideTable : kNarrowTableBytes + fixed_bytes();
  if (share.stages % stages != 0) {
    cut.counters = cut.tiles;
    cut.workspace_bytes = 2 * cut.blocks * rows() * kTokens * 4;
  }
  return cut;
}

Load SmallShape::load(const Cut& cut) const { return {rows(), tokens(), kGroup, cut.part, kWarps}; }
Load DxShape::load(const Cut& cut) const { return {kColumns, tokens(), kRows / 2, cut.part, 1}; }
Load TileShape::load(const Cut& cut) const { return {rows(), kTokens, depth(), cut.part, 1}; }

namespace {

template <size_t kRules>
LinearPlan choose(const Rule (&rules)[kRules], int64_t m, int64_t n, int64_t k, const Card& card) {
  for (const Rule& rule : rules) {
    if (m > rule.max_m || !belongs(card, rule.cards) || is_off(card, rule.name)) continue;
    const Cut cut = std::visit([&](const auto& shape) { return shape.cut(m, n, k, card); }, rule.shape);
    if (cut.blocks != 0 && cut.units < kMost) return {rule.name, rule.shape, cut};
  }
  return {};
}

}  // namespace

LinearPlan plan_linear(bool is_dx, DType dtype, int64_t m, int64_t n, int64_t k, int block_shift,
                       const Card& card, Kernels kernels) {
  if (!takes(is_dx, dtype, m, n, k, block_shift, card)) return {};
  const Crossover crossover = crossover_for(Gemms::kLinear, card, n * k);
  const bool is_by_table = kernels == Kernels::kByTable;
  const Crossover::Range& range = is_dx ? crossover.backward_wgmma : crossover.forward_wgmma;
  if (is_by_table ? range.has(m) : kernels == Kernels::kWgmma) {
    const LinearPlan plan = plan_wgmma(is_dx, m, n, k, card);
    if (plan.has_kernel() || !is_by_table) return plan;
  }
  if (is_by_table && m > (is_dx ? crossover.backward : crossover.forward)) return {};
  return is_dx ? choose(kDxRules, m, n, k, card) : choose(kLinearRules, m, n, k, card);
}

LinearPlan plan_scale_codes(bool is_dx, DType dtype, int64_t m, int64_t n, int64_t k, int block_shift,
                            const Card& card) {
  if (is_dx || dtype != DType::kBF16 || block_shift < 4 || block_shift > 5 || !has_groups(m, n, k, card))
    return {};
  return choose(kScaleCodeRules, m, n, k, card);
}

// As few equal pieces as allowed: each needs two launches, and a large one fills the card.
// linear_pieces.py has the same rule for Triton (`piece_size`).
int64_t piece_of(int64_t count, int64_t length, int64_t element_size, int64_t most_bytes) {
  constexpr int64_t kUnit = 256;  // whole tiles of torch's GEMM
  const int64_t most = most_bytes / (std::max<int64_t>(length, 1) * element_size) / kUnit * kUnit;
  const int64_t pieces = std::max<int64_t>(ceil_div(count, std::max(most, kUnit)), 1);
  return std::max<int64_t>(ceil_div(ceil_div(count, pieces), kUnit), 1) * kUnit;
}

Load LinearPlan::load() const {
  return std::visit([&](const auto& each) { return each.load(cut); }, shape);
}

void LinearPlan::start(const LinearParams& params, Context& context) const {
  std::visit([&](const auto& each) { start_kernel(each, cut, params, context); }, shape);
}

}  // namespace peft_kernels::cuda
