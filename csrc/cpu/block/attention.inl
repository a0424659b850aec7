// Flash attention over one head of keys and values, in blocks (attention_operands.inl): only each query's
// maximum score and sum of exponentials are kept. When a block raises the maximum, earlier sums are rescaled.

#include "attention_few.inl"

template <class Outer, class T>
struct AttentionForward {
  using Sides = AttentionOperands<Outer, T>;
  using Value = typename Outer::Value;
  const AttentionParams& p;
  int64_t depth, columns;
  Value *k_rows, *v_columns, *q_lanes, *steps;
  float *scores, *sums;
  typename Sides::Rows k;
  WorkspaceAllocator workspace;
  AttentionDropout dropout;
  int64_t end;

  // Running softmax state of each query.
  struct Queries {
    float maximum[kStrip], total[kStrip];
  };

  AttentionForward(const AttentionParams& params, void* memory)
      : p(params), k{}, workspace{static_cast<char*>(memory)}, dropout(params, workspace) {
    depth = Sides::padded(p.features);
    columns = round_up(p.features, kStrip);
    k_rows = workspace.take<Value>(Sides::packed_values(p.keys, p.features));
    v_columns = workspace.take<Value>(columns * round_up(p.keys, kStrip));
    q_lanes = workspace.take<Value>(kStrip * depth);
    steps = workspace.take<Value>(kStrip * kStrip);
    scores = workspace.take<float>(kStrip * kStrip);
    sums = workspace.take<float>(columns * kStrip);
    end = workspace.at - static_cast<char*>(memory);
  }

  void pack() {
    k = Sides::rows_of(static_cast<const T*>(p.k), p.k_ld, p.keys, p.features, k_rows);
    Sides::columns_of(static_cast<const T*>(p.v), p.v_ld, p.keys, p.features, v_columns);
  }

  void run(int64_t head, int64_t r0, int64_t rows) const {
    const T* q = static_cast<const T*>(p.q) + head * p.q_head + r0 * p.q_ld;
    Sides::lanes_of(q, p.q_ld, rows, p.features, q_lanes);
    const StripSpans spans(p, r0, rows);
    Queries queries;
    for (int64_t c = 0; c < kStrip; ++c) queries.maximum[c] = kNoScore, queries.total[c] = 0.0f;
    memset(sums, 0, columns * kStrip * sizeof(float));
    for (int64_t k0 = spans.all.first; k0 < spans.all.last; k0 += kStrip) {
      const int64_t keys = min64(kStrip, p.keys - k0);
      const BlockSpans<Outer> block(spans, k0, keys);
      if (block.is_unseen) continue;
      Sides::multiply_keys(block, keys, {k.at + k0 * k.ld, k.ld}, q_lanes, depth, scores);
      dropout.draw(head, r0, k0, keys);
      for (int64_t c = 0; c < kStrip; c += kLanes) {
        if (!block.is_empty(c / kGroup)) apply_softmax(block, spans, k0, c, queries);
      }
      Sides::add_keys(block, p.features, {v_columns + k0 * columns, kStrip}, steps, sums);
    }
    float* maxima = p.softmax + head * 2 * p.rows + r0;
    for (int64_t c = 0; c < rows; c += kLanes) {
      const Vec total = load(queries.total + c), inverse = div(splat(1.0f), total);
      store(queries.total + c, where_zero(total, zero(), inverse));
      store_lanes(maxima + c, where_zero(total, zero(), load(queries.maximum + c)), min64(kLanes, rows - c));
      store_lanes(maxima + p.rows + c, load(queries.total + c), min64(kLanes, rows - c));
    }
    transpose_strip(sums, queries.total, rows, p.features,
                    static_cast<T*>(p.out) + head * p.out_head + r0 * p.out_ld, p.out_ld);
  }

  // Turns the scores of the lanes from c on into exponentials, and rescales earlier sums to the new maximum.
  void apply_softmax(const BlockSpans<Outer>& block, const StripSpans& spans, int64_t k0, int64_t c,
                     Queries& queries) const {
    const int64_t g = c / kGroup;
    const float* column = scores + c;
    const auto seen = [&](int64_t key, auto is_inner, Vec x, Vec other) {
      return is_inner ? x : spans.where_seen(k0 + key, c, x, other);
    };
    const Vec before = load(queries.maximum + c);
    Vec maximum[2] = {before, before};
    block.for_keys(g, [&](int64_t key, auto is_inner) {
      for (int i = 0; i < 2; ++i) {
        const Vec score = load(column + (key + i) * kStrip);
        maximum[i] = max(maximum[i], seen(key + i, is_inner, score, splat(kNoScore)));
      }
    });
    store(queries.maximum + c, max(maximum[0], maximum[1]));
    const ScoreExp<T> score_exp(p.scale, load(queries.maximum + c));
    Vec total[2] = {load(queries.total + c), zero()};
    float earlier[kLanes];
    store(earlier, before);
    if (memcmp(earlier, queries.maximum + c, sizeof(earlier)) != 0 && k0 > spans.all.first) {
      const Vec factor = score_exp.between(before, load(queries.maximum + c));
      total[0] = mul(total[0], factor);
      for (int64_t f = 0; f < p.features; ++f) {
        store(sums + f * kStrip + c, mul(load(sums + f * kStrip + c), factor));
      }
    }
    block.for_keys(g, [&](int64_t key, auto is_inner) {
      Vec weights[2];
      for (int i = 0; i < 2; ++i) {
        const Vec weight = score_exp(load(column + (key + i) * kStrip));
        weights[i] = seen(key + i, is_inner, weight, zero());
        total[i] = add(total[i], weights[i]);
        weights[i] = dropout.kept(key + i, c, weights[i]);
      }
      Sides::store_steps(steps, key, c, weights[0], weights[1]);
    });
    store(queries.total + c, add(total[0], total[1]));
  }
};

// Calls use with the kernel for this number of rows. The workspace may be null when only its size is wanted.
template <class Use>
void with_forward(const AttentionParams& p, void* workspace, const Use& use) {
  with_attention(p, [&](auto outer, auto type) {
    using Outer = decltype(outer);
    using T = decltype(type);
    if (p.rows <= kFewQueries && !AttentionDropout::drops(p)) {
      use(FewQueryAttention<Outer, T>(p, workspace));
    } else {
      use(AttentionForward<Outer, T>(p, workspace));
    }
  });
}

void attention(const AttentionParams& p, int64_t begin, int64_t end, void* workspace) {
#if PEFT_KERNELS_TILES
  const Tiles tiles;
#endif
  with_forward(p, workspace, [&](auto forward) {
    forward.pack();
    for (int64_t head = 0; head < p.heads; ++head) {
      for (int64_t r = begin; r < end; r += kStrip) forward.run(head, r, min64(kStrip, end - r));
    }
  });
}
