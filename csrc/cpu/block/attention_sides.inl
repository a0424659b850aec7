// Shared by the attention kernels. Keys are rows and queries are lanes, a strip of kStrip at a time: the
// state of each query (maximum score, spans [first, last) of keys) is a vector, and nothing is summed across
// lanes.
//
// A block is a strip by kStrip keys. In a block that is partly masked, each group of kGroup queries computes
// only the keys that one of them sees: the diagonal of a causal mask needs five eighths of a block.

constexpr float kNoScore = -3.0e38f;
constexpr int64_t kGroup = 16;  // lanes
constexpr int64_t kGroups = kStrip / kGroup;
static_assert(kAttentionPad == kStrip, "blocks are what callers cut and pad by");
static_assert(kGroup % kLanes == 0, "");

// Hands out consecutive buffers of the workspace.
struct AttentionRoom {
  char* at;

  template <class T>
  T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(at);
    at += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return taken;
  }
};

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
    KeySpan of_any{p.keys, 0};
    for (int64_t g = 0; g < kGroups; ++g) {
      for (Lanes& lanes : spans) lanes.some[g] = {p.keys, 0}, lanes.every[g] = {0, p.keys};
      for (int64_t i = g * kGroup; i < (g + 1) * kGroup; ++i) {
        const RowSpans row = i < rows ? RowSpans(p, begin + i) : RowSpans();
        for (int s = 0; s < kSpans; ++s) add(spans[s], g, i, row.at[s]);
        if (!row.at[1].is_empty()) count = kSpans;
      }
      for (const Lanes& lanes : spans) {
        of_any = {min64(of_any.first, lanes.some[g].first), max64(of_any.last, lanes.some[g].last)};
      }
    }
    all = {of_any.first / kStrip * kStrip, of_any.last};
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

// 2^x within 3e-6 relative, for x below 128; near 0 below -126. NaN propagates.
inline Vec power_of_two(Vec x) {
  x = max(splat(-126.0f), x);
  const Vec shift = splat(12582912.0f + 127.0f);  // as in `exponential`
  const Vec shifted = add(x, shift), r = sub(x, sub(shifted, shift));
  Vec sum = splat(9.58285294e-3f);
  sum = fma(sum, r, splat(5.59064262e-2f));
  sum = fma(sum, r, splat(0.240240991f));
  sum = fma(sum, r, splat(0.693124175f));
  sum = fma(sum, r, splat(1.0f));
  return mul(sum, low_bits_to_exponent(shifted));
}

// e^(scale * (score - maximum)) per lane. For 16-bit dtypes a faster approximation is enough, as the weights
// are rounded to 16 bits.
template <class T>
struct Weigher {
  Vec scale, shift;
  Weigher(float scale_in, Vec most) : scale(splat(scale_in)), shift(most) {
    if (sizeof(T) == sizeof(float)) return;
    scale = mul(scale, splat(1.44269504089f));
    shift = mul(negate(most), scale);
  }
  Vec operator()(Vec score) const {
    if (sizeof(T) == sizeof(float)) return exponential(mul(sub(score, shift), scale));
    return power_of_two(fma(score, scale, shift));
  }
  // The same between two scores, both of which may be kNoScore.
  Vec between(Vec before, Vec most) const {
    const Vec less = mul(sub(before, most), scale);
    return sizeof(T) == sizeof(float) ? exponential(less) : power_of_two(less);
  }
};

// How rows of dtype T become operands of a GEMM.
template <class Outer, class T>
struct AttentionSides {
  using Value = typename Outer::Value;
  static constexpr int64_t kElements = Outer::kElements;

  static int64_t padded(int64_t depth) { return round_up(depth, Outer::kDepthUnit); }
  static MatrixView view(const T* x, int64_t ld) {
    constexpr DType kType = sizeof(T) == sizeof(float) ? DType::kF32
                            : is_bf16(T{})             ? DType::kBF16
                                                       : DType::kF16;
    return {x, kType, ld, nullptr};
  }
  static constexpr bool is_bf16(BF16) { return true; }
  template <class Other>
  static constexpr bool is_bf16(Other) {
    return false;
  }

  // Rows as lhs: in place where possible.
  struct Rows {
    const Value* at;
    int64_t ld;
  };
  static bool lie_right(int64_t rows, int64_t features) {
    return is_value(T{}) && padded(features) == features &&
           (!Outer::kWholeTiles || rows % Outer::kTileRows == 0);
  }
  static int64_t room_of_rows(int64_t rows, int64_t features) {
    return lie_right(rows, features) ? 0 : round_up(rows, kStrip) * padded(features);
  }
  static Rows rows_of(const T* x, int64_t ld, int64_t rows, int64_t features, Value* room) {
    if (lie_right(rows, features)) return {reinterpret_cast<const Value*>(x), ld};
    const int64_t depth = padded(features);
    for (int64_t i = 0; i < round_up(rows, kStrip); ++i) {
      Value* row = room + i * depth;
      if (i < rows) Outer::pack_lhs(x, view(x, ld).dtype, i * ld, features, row);
      const int64_t filled = i < rows ? features : 0;
      memset(row + filled, 0, (depth - filled) * sizeof(Value));
    }
    return {room, depth};
  }
  static bool is_value(float) { return sizeof(Value) == sizeof(float); }
  static bool is_value(BF16) { return sizeof(Value) != sizeof(float); }
  static bool is_value(F16) { return false; }

  // Up to kStrip rows as lanes of a rhs, with features as steps.
  static void lanes_of(const T* x, int64_t ld, int64_t rows, int64_t features, Value* strip) {
    GemmTerm term{};
    term.rhs = view(x, ld);
    term.rhs_scale = 1.0f;
    term.depth = features;
#if PEFT_KERNELS_BF16_DOT
    if constexpr (kElements == 2) {
      nt_fill_thin_pairs(term, 0, rows, strip);
    } else {
      nt_fill_thin(term, 0, rows, strip);
    }
#else
    nt_fill_thin(term, 0, rows, strip);
#endif
    memset(strip + features * kStrip, 0, (padded(features) - features) * kStrip * sizeof(Value));
  }
  // Rows as steps of a rhs, with strips of features as lanes.
  static void steps_of(const T* x, int64_t ld, int64_t rows, int64_t features, Value* strips) {
    Outer::fill_dense(view(x, ld), 1.0f, 0, rows, features, strips);
  }

  // Rows transposed in blocks of kStrip: [rows / kStrip][columns][kStrip], zero-padded.
  static void columns_of(const T* x, int64_t ld, int64_t rows, int64_t features, Value* out) {
    const int64_t columns = round_up(features, kStrip);
    memset(static_cast<void*>(out), 0, round_up(rows, kStrip) * columns * sizeof(Value));
    for (int64_t r = 0; r < rows; r += kStrip) {
      transpose_matrix(x + r * ld, ld, min64(kStrip, rows - r), features, out + r * columns, kStrip);
    }
  }

  // Stores the multipliers of keys k and k + 1, for the lanes from c on, into a rhs.
  static void store_steps(Value* strip, int64_t k, int64_t c, Vec first, Vec second) {
#if PEFT_KERNELS_BF16_DOT
    if constexpr (kElements == 2) {
      store_bits(reinterpret_cast<uint32_t*>(strip + k * kStrip + c * kElements),
                 pair_lanes(first, second, Value{}));
      return;
    }
#endif
    store(strip + k * kStrip + c, first);
    store(strip + (k + 1) * kStrip + c, second);
  }

  // The scores of a block's keys with the lanes that see any of them.
  static void multiply_keys(const BlockSpans<Outer>& spans, int64_t keys, Rows lhs, const Value* lanes,
                            int64_t depth, float* scores) {
    for (int64_t i = 0; i < keys; i += Outer::kTileRows) {
      const int64_t count = min64(Outer::kTileRows, keys - i);
      const KeySpan seen = spans.groups_of(i, count);
      if (seen.is_empty()) continue;
      multiply(count, seen.last - seen.first, {lhs.at + i * lhs.ld, lhs.ld}, lanes + seen.first * kElements,
               depth, 0, depth, false, scores + i * kStrip + seen.first, kStrip);
    }
  }
  // sums[features, lanes] += columns . steps, over the keys that the lanes see.
  static void add_keys(const BlockSpans<Outer>& spans, int64_t features, Rows columns, const Value* steps,
                       float* sums) {
    spans.for_runs([&](int64_t c, int64_t count, int64_t begin, int64_t end) {
      multiply(features, count, {columns.at + begin, columns.ld}, steps + begin * kStrip + c * kElements,
               kStrip, 0, end - begin, true, sums + c, kStrip);
    });
  }

  // sums[rows, cols] (+)= lhs . strips, with `depth` elements of each strip from `from` on; strips are
  // `strip_depth` long.
  static void multiply(int64_t rows, int64_t cols, Rows lhs, const Value* strips, int64_t strip_depth,
                       int64_t from, int64_t depth, bool adds, float* sums, int64_t sums_ld) {
    for (int64_t c = 0; c < cols; c += kStrip) {
      const Value* strip = strips + c * strip_depth + from * kStrip;
      for (int64_t r = 0; r < rows; r += Outer::kTileRows) {
        Outer::multiply(min64(Outer::kTileRows, rows - r), cols - c, lhs.at + r * lhs.ld, lhs.ld, strip,
                        depth / kElements, adds, sums + r * sums_ld + c, sums_ld, no_fetch(strip));
      }
    }
  }
};

// out[r, c] = x[c, r] * factor[r] for the first `rows` lanes of rows x[c], which are kStrip apart; factor may
// be null.
template <class T>
void turn_strip(const float* x, const float* factor, int64_t rows, int64_t features, T* out, int64_t ld) {
  for (int64_t r = 0; r < rows; r += kLanes) {
    const Vec by = factor ? load(factor + r) : splat(1.0f);
    const int64_t height = min64(kLanes, rows - r);
    const auto lanes_of = [&](int64_t c) { return mul(load(x + c * kStrip + r), by); };
    int64_t c = 0;
    Vec block[kLanes];
#if PEFT_KERNELS_BF16_DOT
    if constexpr (sizeof(T) != sizeof(float) && AttentionSides<OuterBF16, T>::is_bf16(T{})) {
      for (; c + 2 * kLanes <= features; c += 2 * kLanes) {
#  pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) {
          block[i] = pair_lanes(lanes_of(c + 2 * i), lanes_of(c + 2 * i + 1), T{});
        }
        transpose(block);
        for (int i = 0; i < height; ++i) {
          store_bits(reinterpret_cast<uint32_t*>(out + (r + i) * ld + c), block[i]);
        }
      }
    }
#endif
    for (; c < features; c += kLanes) {
      const int64_t width = min64(kLanes, features - c);
      for (int i = 0; i < kLanes; ++i) block[i] = i < width ? lanes_of(c + i) : zero();
      transpose(block);
      for (int i = 0; i < height; ++i) store_lanes(out + (r + i) * ld + c, block[i], width);
    }
  }
}

// Calls use(outer, type) with the micro-kernel and the dtype of the arguments.
template <class Use>
void with_attention(const AttentionParams& p, const Use& use) {
  with_type(p.dtype, [&](auto type) {
    if constexpr (sizeof(type) == sizeof(float)) {
      use(OuterF32{}, type);
    } else {
      p.dtype == DType::kBF16&& p.features % 2 == 0 ? use(OuterBF16{}, type) : use(OuterF32{}, type);
    }
  });
}
