#include "plan.h"

#include <algorithm>

namespace peft_kernels::cuda {
namespace {

struct Rule {
  const char* name;
  int64_t shared_bytes;  // that the card has, at least
  int64_t max_m;
  SmallShape small;
};

// The first that fits is taken.
constexpr Rule kLinearRules[] = {
    {"small8", 160 << 10, 8, {1, 1, true}},          {"small16", 160 << 10, 16, {2, 2, true}},
    {"small32", 160 << 10, 32, {4, 2, true}},        {"small8_narrow", 99 << 10, 8, {1, 1, false}},
    {"small16_narrow", 99 << 10, 16, {2, 2, false}}, {"small32_narrow", 99 << 10, 32, {4, 2, false}},
};

struct DxRule {
  const char* name;
  int64_t shared_bytes;
  int64_t max_m;
  DxShape shape;
};

// Beyond one tile of tokens the weight is decoded once for each, and beyond the last of these dequantised.
constexpr DxRule kDxRules[] = {
    {"dx8", 160 << 10, 8, {1, true}},          {"dx16", 160 << 10, 16, {2, true}},
    {"dx32", 200 << 10, 32, {4, true}},        {"dx8_narrow", 99 << 10, 8, {1, false}},
    {"dx16_narrow", 99 << 10, 16, {2, false}}, {"dx32_narrow", 99 << 10, 32, {4, false}},
    {"dx64", 160 << 10, 512, {8, false}},      {"dx32_narrow", 99 << 10, 512, {4, false}},
};

// Scales of whole groups, by 32-bit indices.
bool takes(int64_t m, int64_t n, int64_t k, int block_shift, const Card& card) {
  constexpr int64_t kMost = int64_t{1} << 30;
  return card.compute_capability >= 80 && m > 0 && n > 0 && k > 0 && k % kGroup == 0 &&
         (1 << block_shift) % kGroup == 0 && k % (1 << block_shift) == 0 && n < kMost && k < kMost &&
         n * k / kGroup < int64_t{1} << 32;
}

// Finds places for x, the larger one, and what is of fixed size; returns the bytes for x.
int64_t place(bool wide_table, int64_t fixed_bytes, const Card& card, Cut& cut) {
  if (!wide_table) {
    cut.shared_offset = kNarrowTableBytes;
    cut.x_offset = cut.shared_offset + static_cast<int>(fixed_bytes);
    return card.shared_bytes - cut.x_offset;
  }
  const int64_t behind = card.shared_bytes - kBehindWideTable;
  const bool x_behind = behind > kBeforeWideTable;
  cut.x_offset = x_behind ? kBehindWideTable : 0;
  cut.shared_offset = x_behind ? 0 : kBehindWideTable;
  if (std::min<int64_t>(behind, kBeforeWideTable) < fixed_bytes) return 0;
  return x_behind ? behind : kBeforeWideTable;
}

// All of a block's shared memory, x being of that size.
int64_t shared_bytes(bool wide_table, int64_t x_bytes, int64_t fixed_bytes, const Cut& cut) {
  return std::max<int64_t>({cut.x_offset + x_bytes, cut.shared_offset + fixed_bytes,
                            wide_table ? kBehindWideTable : kNarrowTableBytes});
}

}  // namespace

Cut SmallShape::cut(int64_t m, int64_t n, int64_t k, const Card& card) const {
  Cut cut;
  const int64_t room = place(wide_table, fixed_bytes(), card, cut);
  const int64_t most_chunks = (room / (2 * x_rows(m)) - kPad) / chunk();
  if (most_chunks < 1) return {};

  // Slices of k that fit, and more of them where there are multiprocessors without a tile, as long as half
  // the warps have something to do.
  const int64_t chunks = ceil_div(k, chunk());
  cut.tiles = ceil_div(n, rows());
  const int64_t wanted = std::min<int64_t>(card.sms / cut.tiles, ceil_div(chunks, kWarps / 2));
  const int64_t splits = std::max<int64_t>({1, wanted, ceil_div(chunks, most_chunks)});
  cut.part = static_cast<int>(ceil_div(chunks, splits));
  cut.splits = static_cast<int>(ceil_div(chunks, cut.part));
  cut.blocks = cut.splits * std::min(cut.tiles, std::max<int64_t>(1, card.sms / cut.splits));
  cut.shared_bytes = shared_bytes(wide_table, x_bytes(m, cut.part), fixed_bytes(), cut);
  if (cut.splits > 1) {
    cut.counters = cut.tiles;
    cut.workspace_bytes = cut.tiles * cut.splits * m * rows() * 4;
  }
  return cut;
}

Cut DxShape::cut(int64_t m, int64_t n, int64_t k, const Card& card) const {
  Cut cut;
  const int64_t x_bytes = stages() * stage_bytes();
  if (place(wide_table, fixed_bytes(), card, cut) < x_bytes) return {};
  cut.shared_bytes = shared_bytes(wide_table, x_bytes, fixed_bytes(), cut);
  const int64_t steps = ceil_div(n, kRows);
  cut.tiles = ceil_div(k, kColumns) * ceil_div(m, tokens());
  cut.units = cut.tiles * steps;
  cut.part = static_cast<int>(ceil_div(cut.units, card.sms));
  cut.blocks = ceil_div(cut.units, cut.part);
  if (cut.part % steps != 0) {
    cut.counters = cut.tiles;
    cut.workspace_bytes = cut.blocks * 2 * tokens() * kColumns * 4;
  }
  return cut;
}

Choice choose_linear(int64_t m, int64_t n, int64_t k, int block_shift, const Card& card) {
  if (!takes(m, n, k, block_shift, card)) return {};
  for (const Rule& rule : kLinearRules) {
    if (m > rule.max_m || card.shared_bytes < rule.shared_bytes) continue;
    const Cut cut = rule.small.cut(m, n, k, card);
    if (cut.blocks != 0) return {rule.name, rule.small, cut};
  }
  return {};
}

LinearPlan plan_linear(int64_t m, int64_t n, int64_t k, int block_shift, const Card& card) {
  const Choice choice = choose_linear(m, n, k, block_shift, card);
  return {choice.name, choice.cut.counters, choice.cut.workspace_bytes};
}

DxChoice choose_linear_dx(int64_t m, int64_t n, int64_t k, int block_shift, const Card& card) {
  // Rows of dY are copied 16 bytes at a time.
  if (!takes(m, n, k, block_shift, card) || n % 8 != 0) return {};
  for (const DxRule& rule : kDxRules) {
    if (m > rule.max_m || card.shared_bytes < rule.shared_bytes) continue;
    const Cut cut = rule.shape.cut(m, n, k, card);
    if (cut.blocks != 0) return {rule.name, rule.shape, cut};
  }
  return {};
}

LinearPlan plan_linear_dx(int64_t m, int64_t n, int64_t k, int block_shift, const Card& card) {
  const DxChoice choice = choose_linear_dx(m, n, k, block_shift, card);
  return {choice.name, choice.cut.counters, choice.cut.workspace_bytes};
}

}  // namespace peft_kernels::cuda
