// The gradients of attention, with the softmax weights recomputed in blocks (attention_operands.inl). Weights
// and score gradients, as [keys, queries], are the lhs of dv and dk; dq is accumulated transposed, and
// transposed back at the end.

template <class Outer, class T>
struct AttentionBackward {
  using Sides = AttentionOperands<Outer, T>;
  using Value = typename Outer::Value;
  const AttentionParams& p;
  int64_t depth, columns;
  Value *k_rows, *v_rows, *k_columns, *q_lanes, *q_steps, *d_lanes, *d_steps, *weights, *d_scores,
      *d_score_steps;
  float *scores, *d_weights, *dq;
  typename Sides::Rows k, v;
  WorkspaceAllocator workspace;
  AttentionDropout dropout;
  int64_t end;

  // State of the queries of a strip; 0 past the last one. `delta` is -scale * (dy . out).
  struct Queries {
    float maximum[kStrip], inverse[kStrip], delta[kStrip];
  };

  AttentionBackward(const AttentionParams& params, void* memory)
      : p(params), k{}, v{}, workspace{static_cast<char*>(memory)}, dropout(params, workspace) {
    depth = Sides::padded(p.features);
    columns = round_up(p.features, kStrip);
    k_rows = workspace.take<Value>(Sides::packed_values(p.keys, p.features));
    v_rows = workspace.take<Value>(Sides::packed_values(p.keys, p.features));
    k_columns = workspace.take<Value>(columns * round_up(p.keys, kStrip));
    q_lanes = workspace.take<Value>(kStrip * depth);
    d_lanes = workspace.take<Value>(kStrip * depth);
    q_steps = workspace.take<Value>(kStrip * columns);
    d_steps = workspace.take<Value>(kStrip * columns);
    weights = workspace.take<Value>(kStrip * kStrip);
    d_scores = workspace.take<Value>(kStrip * kStrip);
    d_score_steps = workspace.take<Value>(kStrip * kStrip);
    scores = workspace.take<float>(kStrip * kStrip);
    d_weights = workspace.take<float>(kStrip * kStrip);
    dq = workspace.take<float>(columns * kStrip);
    end = workspace.at - static_cast<char*>(memory);
  }

  void pack() {
    const T* keys = static_cast<const T*>(p.k);
    k = Sides::rows_of(keys, p.k_ld, p.keys, p.features, k_rows);
    v = Sides::rows_of(static_cast<const T*>(p.v), p.v_ld, p.keys, p.features, v_rows);
    Sides::columns_of(keys, p.k_ld, p.keys, p.features, k_columns);
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
    memcpy(queries.maximum, softmax, rows * sizeof(float));
    memcpy(queries.inverse, softmax + p.rows, rows * sizeof(float));
    for (int64_t c = 0; c < rows; c += kLanes) {
      const Vec dots = row_dots(dy + c * p.dy_ld, out + c * p.out_ld, min64(kLanes, rows - c));
      store(queries.delta + c, mul(dots, splat(-p.scale)));
    }
    const StripSpans spans(p, r0, rows);
    memset(dq, 0, columns * kStrip * sizeof(float));
    for (int64_t k0 = spans.all.first; k0 < spans.all.last; k0 += kStrip) {
      const int64_t keys = min64(kStrip, p.keys - k0);
      const BlockSpans<Outer> block(spans, k0, keys);
      if (block.is_unseen) continue;
      Sides::multiply_keys(block, keys, {k.at + k0 * k.ld, k.ld}, q_lanes, depth, scores);
      Sides::multiply_keys(block, keys, {v.at + k0 * v.ld, v.ld}, d_lanes, depth, d_weights);
      dropout.draw(head, r0, k0, keys);
      for (int64_t c = 0; c < kStrip; c += kLanes) score_gradients(block, spans, k0, keys, c, queries);
      add_queries(block, spans, k0, rows, weights, d_steps, p.dv_sums);
      add_queries(block, spans, k0, rows, d_scores, q_steps, p.dk_sums);
      Sides::add_keys(block, p.features, {k_columns + k0 * columns, kStrip}, d_score_steps, dq);
    }
    transpose_strip(dq, nullptr, rows, p.features, static_cast<T*>(p.dq) + head * p.dq_head + r0 * p.dq_ld,
                    p.dq_ld);
  }

  // sums[keys, features] += lhs . steps, over the queries that see any key of a register tile.
  void add_queries(const BlockSpans<Outer>& block, const StripSpans& spans, int64_t k0, int64_t rows,
                   const Value* lhs, const Value* steps, float* sums) const {
    const int64_t all_rows = Sides::padded(rows), keys = min64(kStrip, p.keys - k0);
    for (int64_t i = 0; i < keys; i += Outer::kTileRows) {
      const int64_t count = min64(Outer::kTileRows, keys - i);
      const KeySpan lanes = block.lanes_of(spans, k0, i, count);
      const int64_t end_row = min64(lanes.last, all_rows);
      if (lanes.first >= end_row) continue;
      Sides::multiply(count, p.features, {lhs + i * kStrip + lanes.first, kStrip}, steps, all_rows,
                      lanes.first, end_row - lanes.first, true, sums + (k0 + i) * columns, columns);
    }
  }

  // For the lanes from c on: the softmax weights, and the gradients of the unscaled scores.
  void score_gradients(const BlockSpans<Outer>& block, const StripSpans& spans, int64_t k0, int64_t keys,
                       int64_t c, const Queries& queries) const {
    const int64_t g = c / kGroup;
    for (int64_t key = 0; key < keys; ++key) {
      if (key == block.begin[g]) key = block.end[g];
      if (key >= keys) break;
      store(weights + key * kStrip + c, zero());
      store(d_scores + key * kStrip + c, zero());
    }
    const ScoreExp<T> score_exp(p.scale, load(queries.maximum + c));
    const Vec scale = splat(p.scale), inverse = load(queries.inverse + c), delta = load(queries.delta + c);
    block.for_keys(g, [&](int64_t first, auto is_inner) {
      Vec d_score[2];
      for (int i = 0; i < 2; ++i) {
        const int64_t key = first + i, at = key * kStrip + c;
        Vec weight = mul(score_exp(load(scores + at)), inverse);
        d_score[i] = mul(weight, fma(dropout.kept(key, c, load(d_weights + at)), scale, delta));
        weight = dropout.kept(key, c, weight);
        if (!is_inner) {  // may include scores that were not computed
          weight = spans.where_seen(k0 + key, c, weight, zero());
          d_score[i] = spans.where_seen(k0 + key, c, d_score[i], zero());
        }
        store(weights + at, weight);
        store(d_scores + at, d_score[i]);
      }
      Sides::store_steps(d_score_steps, first, c, d_score[0], d_score[1]);
    });
  }

  // dy . out of up to kLanes rows, one per lane.
  Vec row_dots(const T* dy, const T* out, int64_t rows) const {
    Vec sums[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) {
      sums[i] = zero();
      for_lanes(0, i < rows ? p.features : 0, [&](int64_t c, int64_t n) {
        sums[i] = fma(load_lanes(dy + i * p.dy_ld + c, n), load_lanes(out + i * p.out_ld + c, n), sums[i]);
      });
    }
    transpose(sums);
    for (int64_t width = kLanes / 2; width > 0; width /= 2) {
      for (int64_t i = 0; i < width; ++i) sums[i] = add(sums[i], sums[i + width]);
    }
    return sums[0];
  }
};

int64_t attention_workspace_bytes(const AttentionParams& p, bool is_backward) {
  int64_t bytes = 0;
  if (is_backward) {
    with_attention(p, [&](auto outer, auto type) {
      bytes = AttentionBackward<decltype(outer), decltype(type)>(p, nullptr).end;
    });
  } else {
    with_forward(p, nullptr, [&](const auto& forward) { bytes = forward.end; });
  }
  return bytes;
}

void attention_backward(const AttentionParams& p, void* workspace) {
#if PEFT_KERNELS_TILES
  const Tiles tiles;
#endif
  with_attention(p, [&](auto outer, auto type) {
    AttentionBackward<decltype(outer), decltype(type)> backward(p, workspace);
    backward.pack();
    for (int64_t head = 0; head < p.heads; ++head) {
      for (int64_t r = 0; r < p.rows; r += kStrip) backward.run(head, r, min64(kStrip, p.rows - r));
    }
  });
}
