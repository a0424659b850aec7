// Attention over one head of keys and values, in blocks of kStrip queries by kStrip keys, of which nothing is
// kept but each query's greatest score and sum of exponentials. A query attends to a span of keys, [first,
// last).
//
// A block of queries has its scores with up to kScoreKeys keys at once, their exponentials beside them, and
// the product of these with v. Where more keys come, what was summed is scaled to the greater score.

constexpr int64_t kScoreKeys = 512;
constexpr float kNoScore = -3.0e38f;
static_assert(kAttentionPad == kStrip, "blocks are what callers cut and pad by");

// Buffers, one after the other.
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

inline KeySpan span_of(const AttentionParams& p, int64_t row) {
  KeySpan span{0, p.keys};
  if (p.spans) span = {max64(0, p.spans[2 * row]), min64(p.keys, p.spans[2 * row + 1])};
  if (p.is_causal) span.last = min64(span.last, row + p.keys - p.rows + 1);
  return span;
}

// The keys that any of some rows attends to, from a block's start on.
inline KeySpan span_of_rows(const AttentionParams& p, int64_t begin, int64_t rows) {
  KeySpan all{p.keys, 0};
  for (int64_t i = begin; i < begin + rows; ++i) {
    const KeySpan span = span_of(p, i);
    if (!span.is_empty()) all = {min64(all.first, span.first), max64(all.last, span.last)};
  }
  return {all.first / kStrip * kStrip, all.last};
}

// What the kernels of one type share: how its rows become sides of a product.
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

  // Rows as the left side of products: as they lie, where that can be.
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

  // Up to kStrip rows as the lanes of a right side, features in steps.
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
  // Rows as the steps of a right side, strips of features as its lanes.
  static void steps_of(const T* x, int64_t ld, int64_t rows, int64_t features, Value* strips) {
    Outer::fill_dense(view(x, ld), 1.0f, 0, rows, features, strips);
  }

  // sums[rows, cols] (+)= lhs . strips, `depth` elements of the latter from `from` on, of strips that are
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

template <class Outer, class T>
struct AttentionForward {
  using Sides = AttentionSides<Outer, T>;
  using Value = typename Outer::Value;
  const AttentionParams& p;
  int64_t depth, columns;  // of the features, as depth and as columns of a product
  Value *keys, *values, *rounded, *packed_rows;
  float *scores, *sums;

  static int64_t bytes(const AttentionParams& p) {
    AttentionForward self(p, nullptr);
    return self.end;
  }
  int64_t end;

  AttentionForward(const AttentionParams& params, void* memory) : p(params) {
    AttentionRoom room{static_cast<char*>(memory)};
    depth = Sides::padded(p.features);
    columns = round_up(p.features, kStrip);
    const int64_t all = round_up(p.keys, kStrip);
    keys = room.take<Value>(all * depth);
    values = room.take<Value>(all * columns);
    rounded = room.take<Value>(kStrip * kScoreKeys);
    packed_rows = room.take<Value>(kStrip * depth);
    scores = room.take<float>(kStrip * kScoreKeys);
    sums = room.take<float>(kStrip * columns);
    end = room.at - static_cast<char*>(memory);
  }

  void pack() const {
    const T *k = static_cast<const T*>(p.k), *v = static_cast<const T*>(p.v);
    for (int64_t k0 = 0; k0 < p.keys; k0 += kStrip) {
      Sides::lanes_of(k + k0 * p.k_ld, p.k_ld, min64(kStrip, p.keys - k0), p.features, keys + k0 * depth);
    }
    for (int64_t k0 = 0; k0 < p.keys; k0 += kScoreKeys) {
      Sides::steps_of(v + k0 * p.v_ld, p.v_ld, min64(kScoreKeys, p.keys - k0), p.features,
                      values + k0 * columns);
    }
  }

  void run(int64_t head, int64_t r0, int64_t rows) const {
    const T* q = static_cast<const T*>(p.q) + head * p.q_head + r0 * p.q_ld;
    T* out = static_cast<T*>(p.out) + head * p.out_head + r0 * p.out_ld;
    float* maxima = p.softmax + head * 2 * p.rows + r0;
    float* inverses = maxima + p.rows;
    const auto lhs = Sides::rows_of(q, p.q_ld, rows, p.features, packed_rows);
    const KeySpan all = span_of_rows(p, r0, rows);
    float most[kStrip], total[kStrip];
    for (int64_t i = 0; i < rows; ++i) most[i] = kNoScore, total[i] = 0.0f;
    memset(sums, 0, kStrip * columns * sizeof(float));
    for (int64_t c0 = all.first / kScoreKeys * kScoreKeys; c0 < all.last; c0 += kScoreKeys) {
      const int64_t chunk = min64(kScoreKeys, p.keys - c0), chunk_depth = Sides::padded(chunk);
      const int64_t first = max64(c0, all.first), last = min64(c0 + chunk, all.last);
      const int64_t depth_here = min64(round_up(last - first, kStrip), chunk_depth - (first - c0));
      for (int64_t k0 = first; k0 < last; k0 += kStrip) {
        Sides::multiply(rows, kStrip, lhs, keys + k0 * depth, depth, 0, depth, false, scores + (k0 - c0),
                        kScoreKeys);
      }
      for (int64_t i = 0; i < rows; ++i) {
        const KeySpan span = span_of(p, r0 + i);
        // Of the chunk's columns.
        const int64_t begin = max64(first, span.first) - c0, end_here = min64(last, span.last) - c0;
        exponentials(i, first - c0, begin, max64(begin, end_here), first - c0 + depth_here, most[i],
                     total[i]);
      }
      Sides::multiply(rows, p.features, {rounded + (first - c0), kScoreKeys}, values + c0 * columns,
                      chunk_depth, first - c0, depth_here, true, sums, columns);
    }
    for (int64_t i = 0; i < rows; ++i) {
      const bool is_empty = total[i] == 0.0f;
      maxima[i] = is_empty ? 0.0f : most[i];
      inverses[i] = is_empty ? 0.0f : 1.0f / total[i];
      const Vec inverse = splat(inverses[i]);
      for_lanes(0, p.features, [&](int64_t c, int64_t n) {
        store_lanes(out + i * p.out_ld + c, mul(load_lanes(sums + i * columns + c, n), inverse), n);
      });
    }
  }

  // e^(scale * (score - most)) of columns [begin, end) of a row, and 0 in the others of [from, to), rounded.
  void exponentials(int64_t i, int64_t from, int64_t begin, int64_t end, int64_t to, float& most,
                    float& total) const {
    const float* row = scores + i * kScoreKeys;
    Value* result = rounded + i * kScoreKeys;
    begin = min64(begin, to);
    end = min64(max64(end, begin), to);
    memset(result + from, 0, (begin - from) * sizeof(Value));
    memset(result + end, 0, (to - end) * sizeof(Value));
    if (begin == end) return;
    const float before = most;
    most = row_max(row + begin, end - begin, most);
    if (before != most && before != kNoScore) {
      const float factor = exponential(p.scale * (before - most));
      total *= factor;
      float* sum = sums + i * columns;
      for (int64_t c = 0; c < columns; c += kLanes) store(sum + c, mul(load(sum + c), splat(factor)));
    }
    const Vec scale = splat(p.scale), greatest = splat(most);
    Vec sums_of[2] = {zero(), zero()};
    for_lanes(begin, end, [&](int64_t c, int64_t n) {
      const Vec e = exponential(mul(sub(load_lanes(row + c, n), greatest), scale));
      store_lanes(result + c, e, n);
      Vec& sum = sums_of[(c - begin) / kLanes % 2];
      sum = add(sum, n == kLanes ? e : first_lanes(e, n));
    });
    total += sum_lanes(add(sums_of[0], sums_of[1]));
  }
  static Vec first_lanes(Vec x, int64_t count) {
    float lanes[kLanes];
    store(lanes, x);
    for (int64_t i = count; i < kLanes; ++i) lanes[i] = 0.0f;
    return load(lanes);
  }
};

// Calls use(outer, type) with the micro-kernel and the elements of the arguments.
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

void attention(const AttentionParams& p, int64_t begin, int64_t end, void* room) {
#if PEFT_KERNELS_TILES
  const Tiles tiles;
#endif
  with_attention(p, [&](auto outer, auto type) {
    AttentionForward<decltype(outer), decltype(type)> forward(p, room);
    forward.pack();
    for (int64_t head = 0; head < p.heads; ++head) {
      for (int64_t r = begin; r < end; r += kStrip) forward.run(head, r, min64(kStrip, end - r));
    }
  });
}
