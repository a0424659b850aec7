// Which keys the queries of attention see, as spans [first, last).
//
// A block is a strip by kStrip keys. In a block that is partly masked, each group of kGroup queries computes
// only the keys that one of them sees: the diagonal of a causal mask needs five eighths of a block.

constexpr float kNoScore = -3.0e38f;
constexpr int64_t kGroup = 16;  // lanes
constexpr int64_t kGroups = kStrip / kGroup;
static_assert(kAttentionPad == kStrip, "blocks are what callers cut and pad by");
static_assert(kGroup % kLanes == 0, "");

struct KeySpan {
  int64_t first, last;
  bool is_empty() const { return first >= last; }
};

constexpr int kSpans = 2;

// The keys of a row as up to two spans: disjoint, not adjacent, in ascending order.
struct RowSpans {
  KeySpan at[kSpans];

  RowSpans() : at{{0, 0}, {0, 0}} {}
  RowSpans(const AttentionParams& p, int64_t row) : at{{0, p.keys}, {0, 0}} {
    const int64_t end = p.is_causal ? row + p.keys - p.rows + 1 : p.keys;
    const int64_t count = p.spans ? p.span_count : 1;
    for (int64_t i = 0; i < count; ++i) {
      const int32_t* span = p.spans ? p.spans + 2 * (row * count + i) : nullptr;
      if (span) at[i] = {max64(0, span[0]), min64(p.keys, span[1])};
      at[i].last = min64(at[i].last, end);
    }
    if (at[1].is_empty()) return;
    if (at[0].is_empty() || at[1].first < at[0].first) {
      const KeySpan first = at[1];
      at[1] = at[0], at[0] = first;
    }
    if (at[1].first <= at[0].last) at[0].last = max64(at[0].last, at[1].last), at[1] = {0, 0};
  }
};

// The keys of a strip of rows; none for lanes past the last row.
struct StripSpans {
  struct Lanes {
    float first[kStrip], last[kStrip];      // last: minus half a key, for comparisons in floats
    KeySpan some[kGroups], every[kGroups];  // keys that any, and that all, lanes of a group see
  };
  Lanes spans[kSpans];
  int count;          // of spans used by any row
  KeySpan all{0, 0};  // keys that any row sees, rounded down to a block

  StripSpans(const AttentionParams& p, int64_t begin, int64_t rows) : count(1) {
    KeySpan any_row{p.keys, 0};
    for (int64_t g = 0; g < kGroups; ++g) {
      for (Lanes& lanes : spans) lanes.some[g] = {p.keys, 0}, lanes.every[g] = {0, p.keys};
      for (int64_t i = g * kGroup; i < (g + 1) * kGroup; ++i) {
        const RowSpans row = i < rows ? RowSpans(p, begin + i) : RowSpans();
        for (int s = 0; s < kSpans; ++s) add(spans[s], g, i, row.at[s]);
        if (!row.at[1].is_empty()) count = kSpans;
      }
      for (const Lanes& lanes : spans) {
        any_row = {min64(any_row.first, lanes.some[g].first), max64(any_row.last, lanes.some[g].last)};
      }
    }
    all = {any_row.first / kStrip * kStrip, any_row.last};
  }

  // For `key` and the lanes from c on: x where the lane sees the key, else `other`.
  Vec where_seen(int64_t key, int64_t c, Vec x, Vec other) const {
    const Vec index = splat(static_cast<float>(key));
    for (int s = 0; s < count; ++s) {
      const Vec behind = by_sign(sub(index, load(spans[s].first + c)), other, x);
      other = by_sign(sub(index, load(spans[s].last + c)), behind, other);
    }
    return other;
  }
  // Whether a lane sees any of the keys [begin, end).
  bool sees(int64_t lane, int64_t begin, int64_t end) const {
    for (int s = 0; s < count; ++s) {
      const float first = spans[s].first[lane], last = spans[s].last[lane];
      if (last >= static_cast<float>(begin) && first < static_cast<float>(end)) return true;
    }
    return false;
  }

 private:
  static void add(Lanes& lanes, int64_t g, int64_t lane, KeySpan span) {
    KeySpan &some = lanes.some[g], &every = lanes.every[g];
    lanes.first[lane] = static_cast<float>(span.first);
    lanes.last[lane] = static_cast<float>(span.last) - 0.5f;
    every = {max64(every.first, span.first), min64(every.last, span.last)};
    if (!span.is_empty()) some = {min64(some.first, span.first), max64(some.last, span.last)};
  }
};

// The keys of a block, counted from 0, that each group of a strip computes, in whole units of the depth:
// [begin, end), of which all its lanes see [inner_begin, inner_end).
template <class Outer>
struct BlockSpans {
  int64_t begin[kGroups], end[kGroups], inner_begin[kGroups], inner_end[kGroups];
  bool is_unseen = true;  // by all lanes

  BlockSpans(const StripSpans& strip, int64_t k0, int64_t keys) {
    constexpr int64_t kUnit = 2;  // keys processed at once
    for (int64_t g = 0; g < kGroups; ++g) {
      KeySpan some{keys, 0}, inner{0, 0};
      for (int s = 0; s < strip.count; ++s) {
        const KeySpan any = within(strip.spans[s].some[g], k0, keys);
        const KeySpan every = within(strip.spans[s].every[g], k0, keys);
        if (!any.is_empty()) some = {min64(some.first, any.first), max64(some.last, any.last)};
        if (every.last - every.first > inner.last - inner.first) inner = every;
      }
      is_unseen = is_unseen && some.is_empty();
      begin[g] = some.is_empty() ? 0 : some.first / kUnit * kUnit;
      end[g] = some.is_empty() ? 0 : round_up(some.last, kUnit);
      if (Outer::kWholeTiles) begin[g] = 0, end[g] = round_up(keys, Outer::kDepthUnit);
      inner_begin[g] = min64(round_up(max64(begin[g], inner.first), kUnit), end[g]);
      inner_end[g] = max64(inner_begin[g], min64(end[g], inner.last) / kUnit * kUnit);
    }
  }
  static KeySpan within(KeySpan span, int64_t k0, int64_t keys) {
    return {max64(0, span.first - k0), min64(keys, span.last - k0)};
  }
  bool is_empty(int64_t g) const { return begin[g] >= end[g]; }

  // Calls use(lane, lanes, begin, end) for neighbouring groups with the same keys.
  template <class Use>
  void for_runs(const Use& use) const {
    for (int64_t g = 0, next = 0; g < kGroups; g = next) {
      for (next = g + 1; next < kGroups && begin[next] == begin[g] && end[next] == end[g];) ++next;
      if (!is_empty(g)) use(g * kGroup, (next - g) * kGroup, begin[g], end[g]);
    }
  }
  // Calls step(key, is_inner) for every second key of a group; is_inner is a constant.
  template <class Step>
  void for_keys(int64_t g, const Step& step) const {
    for (int64_t k = begin[g]; k < inner_begin[g]; k += 2) step(k, Constant<0>{});
    for (int64_t k = inner_begin[g]; k < inner_end[g]; k += 2) step(k, Constant<1>{});
    for (int64_t k = inner_end[g]; k < end[g]; k += 2) step(k, Constant<0>{});
  }
  // The lanes that see any of the keys [key, key + count), as whole groups.
  KeySpan groups_of(int64_t key, int64_t count) const {
    int64_t first = kGroups, last = 0;
    for (int64_t g = 0; g < kGroups; ++g) {
      if (begin[g] < key + count && key < end[g]) first = min64(first, g), last = g + 1;
    }
    return {first * kGroup, last * kGroup};
  }
  // The same in units of the depth, without leading lanes that see none.
  KeySpan lanes_of(const StripSpans& strip, int64_t k0, int64_t key, int64_t count) const {
    KeySpan lanes = groups_of(key, count);
    while (!lanes.is_empty() && !strip.sees(lanes.first, k0 + key, k0 + key + count)) ++lanes.first;
    return {lanes.first / Outer::kDepthUnit * Outer::kDepthUnit, lanes.last};
  }
};
