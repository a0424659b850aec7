// Attention of a few queries, which would leave most lanes empty if queries were lanes: queries are rows and
// keys are lanes. Scores with up to kScoreKeys keys are computed at once, then their exponentials and the
// GEMM with v. When a later chunk raises the maximum, earlier sums are rescaled.

#include "attention_dropout.inl"

constexpr int64_t kFewQueries = 24;
constexpr int64_t kScoreKeys = 512;

template <class Outer, class T>
struct FewQueryAttention {
  using Sides = AttentionOperands<Outer, T>;
  using Value = typename Outer::Value;
  const AttentionParams& p;
  int64_t depth, columns;  // of the features, padded as the depth and as the columns of a GEMM
  Value *keys, *values, *rounded, *packed_rows;
  float *scores, *sums;
  int64_t end;

  FewQueryAttention(const AttentionParams& params, void* memory) : p(params) {
    WorkspaceAllocator workspace{static_cast<char*>(memory)};
    depth = Sides::padded(p.features);
    columns = round_up(p.features, kStrip);
    const int64_t all = round_up(p.keys, kStrip);
    keys = workspace.take<Value>(all * depth);
    values = workspace.take<Value>(all * columns);
    rounded = workspace.take<Value>(kStrip * kScoreKeys);
    packed_rows = workspace.take<Value>(kStrip * depth);
    scores = workspace.take<float>(kStrip * kScoreKeys);
    sums = workspace.take<float>(kStrip * columns);
    end = workspace.at - static_cast<char*>(memory);
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
    const KeySpan all = StripSpans(p, r0, rows).all;
    float maximum[kStrip], total[kStrip];
    for (int64_t i = 0; i < rows; ++i) maximum[i] = kNoScore, total[i] = 0.0f;
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
        RowSpans row(p, r0 + i);
        for (KeySpan& span : row.at) span = {max64(first, span.first) - c0, min64(last, span.last) - c0};
        exponentials(i, first - c0, row, first - c0 + depth_here, maximum[i], total[i]);
      }
      Sides::multiply(rows, p.features, {rounded + (first - c0), kScoreKeys}, values + c0 * columns,
                      chunk_depth, first - c0, depth_here, true, sums, columns);
    }
    for (int64_t i = 0; i < rows; ++i) {
      const bool is_empty = total[i] == 0.0f;
      maxima[i] = is_empty ? 0.0f : maximum[i];
      inverses[i] = is_empty ? 0.0f : 1.0f / total[i];
      const Vec inverse = splat(inverses[i]);
      for_lanes(0, p.features, [&](int64_t c, int64_t n) {
        store_lanes(out + i * p.out_ld + c, mul(load_lanes(sums + i * columns + c, n), inverse), n);
      });
    }
  }

  // e^(scale * (score - maximum)) of a row's columns in `spans`, and 0 in the others of [from, to), rounded.
  void exponentials(int64_t i, int64_t from, const RowSpans& spans, int64_t to, float& maximum,
                    float& total) const {
    const float* row = scores + i * kScoreKeys;
    Value* result = rounded + i * kScoreKeys;
    memset(result + from, 0, (to - from) * sizeof(Value));
    const float before = maximum;
    for (const KeySpan& span : spans.at) {
      if (!span.is_empty()) maximum = row_max(row + span.first, span.last - span.first, maximum);
    }
    if (before != maximum && before != kNoScore) {
      const float factor = exponential(p.scale * (before - maximum));
      total *= factor;
      float* sum = sums + i * columns;
      for (int64_t c = 0; c < columns; c += kLanes) store(sum + c, mul(load(sum + c), splat(factor)));
    }
    const Vec scale = splat(p.scale), greatest = splat(maximum);
    Vec sums_of[2] = {zero(), zero()};
    for (const KeySpan& span : spans.at) {
      for_lanes(span.first, span.last, [&](int64_t c, int64_t n) {
        const Vec e = exponential(mul(sub(load_lanes(row + c, n), greatest), scale));
        store_lanes(result + c, e, n);
        Vec& sum = sums_of[(c - span.first) / kLanes % 2];
        sum = add(sum, n == kLanes ? e : first_lanes(e, n));
      });
    }
    total += sum_lanes(add(sums_of[0], sums_of[1]));
  }
  static Vec first_lanes(Vec x, int64_t count) {
    float lanes[kLanes];
    store(lanes, x);
    for (int64_t i = count; i < kLanes; ++i) lanes[i] = 0.0f;
    return load(lanes);
  }
};
