// The gradients of attention, whose weights are computed again. Keys are rows, queries lanes: the transposed
// weights and slopes are what dv and dk are products of as they lie, and of what each query has (its sum, its
// span) a vector is loaded. Only dq is summed transposed, and turned at the end.

template <class Outer, class T>
struct AttentionBackward {
  using Sides = AttentionSides<Outer, T>;
  using Value = typename Outer::Value;
  const AttentionParams& p;
  int64_t depth, columns, all_keys;
  Value *k_rows, *v_rows, *k_columns, *q_lanes, *q_steps, *d_lanes, *d_steps, *weights, *slopes, *slope_steps;
  float *scores, *d_scores, *dq;
  int64_t end;
  typename Sides::Rows k, v;

  // What each of a strip has; beyond the last all is 0, and so is what is attended to.
  struct Queries {
    float most[kStrip], inverse[kStrip], delta[kStrip];
    float first[kStrip], last[kStrip];  // the latter half a key before the one behind
  };

  static int64_t bytes(const AttentionParams& p) {
    AttentionBackward self(p, nullptr);
    return self.end;
  }

  AttentionBackward(const AttentionParams& params, void* memory) : p(params), k{}, v{} {
    AttentionRoom room{static_cast<char*>(memory)};
    depth = Sides::padded(p.features);
    columns = round_up(p.features, kStrip);
    all_keys = round_up(p.keys, kStrip);
    k_rows = room.take<Value>(Sides::room_of_rows(p.keys, p.features));
    v_rows = room.take<Value>(Sides::room_of_rows(p.keys, p.features));
    k_columns = room.take<Value>(columns * all_keys);
    q_lanes = room.take<Value>(kStrip * depth);
    d_lanes = room.take<Value>(kStrip * depth);
    q_steps = room.take<Value>(kStrip * columns);
    d_steps = room.take<Value>(kStrip * columns);
    weights = room.take<Value>(kStrip * kStrip);
    slopes = room.take<Value>(kStrip * kStrip);
    slope_steps = room.take<Value>(kStrip * kStrip);
    scores = room.take<float>(kStrip * kStrip);
    d_scores = room.take<float>(kStrip * kStrip);
    dq = room.take<float>(columns * kStrip);
    end = room.at - static_cast<char*>(memory);
  }

  void pack() {
    const T* keys = static_cast<const T*>(p.k);
    k = Sides::rows_of(keys, p.k_ld, p.keys, p.features, k_rows);
    v = Sides::rows_of(static_cast<const T*>(p.v), p.v_ld, p.keys, p.features, v_rows);
    memset(static_cast<void*>(k_columns), 0, columns * all_keys * sizeof(Value));
    transpose_matrix(keys, p.k_ld, p.keys, p.features, k_columns, all_keys);
  }

  void run(int64_t head, int64_t r0, int64_t rows) const {
    const T* q = static_cast<const T*>(p.q) + head * p.q_head + r0 * p.q_ld;
    const T* out = static_cast<const T*>(p.out) + head * p.out_head + r0 * p.out_ld;
    const T* dy = static_cast<const T*>(p.dy) + head * p.dy_head + r0 * p.dy_ld;
    Sides::lanes_of(q, p.q_ld, rows, p.features, q_lanes);
    Sides::lanes_of(dy, p.dy_ld, rows, p.features, d_lanes);
    Sides::steps_of(q, p.q_ld, rows, p.features, q_steps);
    Sides::steps_of(dy, p.dy_ld, rows, p.features, d_steps);
    const float* softmax = p.softmax + head * 2 * p.rows + r0;
    Queries queries{};
    KeySpan whole{0, p.keys};  // what all of them attend to
    for (int64_t i = 0; i < kStrip; ++i) {
      const KeySpan span = i < rows ? span_of(p, r0 + i) : KeySpan{0, 0};
      whole = {max64(whole.first, span.first), min64(whole.last, span.last)};
      if (i >= rows) continue;
      queries.most[i] = softmax[i];
      queries.inverse[i] = softmax[p.rows + i];
      queries.delta[i] = row_product(dy + i * p.dy_ld, out + i * p.out_ld);
      queries.first[i] = static_cast<float>(span.first);
      queries.last[i] = static_cast<float>(span.last) - 0.5f;
    }
    const int64_t row_depth = Sides::padded(rows);
    const KeySpan all = span_of_rows(p, r0, rows);
    memset(dq, 0, columns * kStrip * sizeof(float));
    for (int64_t k0 = all.first; k0 < all.last; k0 += kStrip) {
      const int64_t keys = min64(kStrip, p.keys - k0);
      Sides::multiply(keys, kStrip, {k.at + k0 * k.ld, k.ld}, q_lanes, depth, 0, depth, false, scores,
                      kStrip);
      Sides::multiply(keys, kStrip, {v.at + k0 * v.ld, v.ld}, d_lanes, depth, 0, depth, false, d_scores,
                      kStrip);
      const bool is_whole = whole.first <= k0 && k0 + keys <= whole.last;
      for (int64_t i = 0; i < keys; ++i) {
        is_whole ? slopes_of<true>(i, k0 + i, queries) : slopes_of<false>(i, k0 + i, queries);
      }
      const int64_t at = k0 * columns;
      Sides::multiply(keys, p.features, {weights, kStrip}, d_steps, row_depth, 0, row_depth, true,
                      p.dv_sums + at, columns);
      Sides::multiply(keys, p.features, {slopes, kStrip}, q_steps, row_depth, 0, row_depth, true,
                      p.dk_sums + at, columns);
      const int64_t key_depth = Sides::padded(keys);
      constexpr DType kType = sizeof(Value) == sizeof(float) ? DType::kF32 : DType::kBF16;
      Outer::fill_dense({slopes, kType, kStrip, nullptr}, 1.0f, 0, keys, kStrip, slope_steps);
      Sides::multiply(p.features, kStrip, {k_columns + k0, all_keys}, slope_steps, key_depth, 0, key_depth,
                      true, dq, kStrip);
    }
    transpose_matrix(dq, kStrip, p.features, rows, static_cast<T*>(p.dq) + head * p.dq_head + r0 * p.dq_ld,
                     p.dq_ld);
  }

  // The weights of one key in all queries' sums, and the slopes of its scores before they were scaled.
  template <bool kIsWhole>
  void slopes_of(int64_t i, int64_t key, const Queries& queries) const {
    const Vec scale = splat(p.scale), index = splat(static_cast<float>(key));
    for (int64_t c = 0; c < kStrip; c += kLanes) {
      const int64_t at = i * kStrip + c;
      const Vec score = mul(sub(load(scores + at), load(queries.most + c)), scale);
      Vec weight = mul(exponential(score), load(queries.inverse + c));
      if (!kIsWhole) {
        weight = by_sign(sub(index, load(queries.first + c)), zero(), weight);
        weight = by_sign(sub(index, load(queries.last + c)), weight, zero());
      }
      store(weights + at, weight);
      store(slopes + at, mul(mul(weight, scale), sub(load(d_scores + at), load(queries.delta + c))));
    }
  }

  float row_product(const T* a, const T* b) const {
    Vec sums[2] = {zero(), zero()};
    for_lanes(0, p.features, [&](int64_t c, int64_t n) {
      Vec& sum = sums[c / kLanes % 2];
      sum = fma(load_lanes(a + c, n), load_lanes(b + c, n), sum);
    });
    return sum_lanes(add(sums[0], sums[1]));
  }
};

int64_t attention_bytes(const AttentionParams& p, bool is_backward) {
  int64_t bytes = 0;
  with_attention(p, [&](auto outer, auto type) {
    using Outer = decltype(outer);
    using T = decltype(type);
    bytes = is_backward ? AttentionBackward<Outer, T>::bytes(p) : AttentionForward<Outer, T>::bytes(p);
  });
  return bytes;
}

void attention_backward(const AttentionParams& p, void* room) {
#if PEFT_KERNELS_TILES
  const Tiles tiles;
#endif
  with_attention(p, [&](auto outer, auto type) {
    AttentionBackward<decltype(outer), decltype(type)> backward(p, room);
    backward.pack();
    for (int64_t head = 0; head < p.heads; ++head) {
      for (int64_t r = 0; r < p.rows; r += kStrip) backward.run(head, r, min64(kStrip, p.rows - r));
    }
  });
}
