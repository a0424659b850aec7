// Shared by the attention kernels. Keys are rows and queries are lanes, a strip of kStrip at a time: the
// state of each query (maximum score, spans [first, last) of keys) is a vector, and nothing is summed across
// lanes.

#include "attention_spans.inl"

// Hands out consecutive buffers of the workspace.
struct WorkspaceAllocator {
  char* at;

  template <class T>
  T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(at);
    at += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return taken;
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
struct ScoreExp {
  Vec scale, shift;
  ScoreExp(float scale_in, Vec maximum) : scale(splat(scale_in)), shift(maximum) {
    if (sizeof(T) == sizeof(float)) return;
    scale = mul(scale, splat(1.44269504089f));
    shift = mul(negate(maximum), scale);
  }
  Vec operator()(Vec score) const {
    if (sizeof(T) == sizeof(float)) return exponential(mul(sub(score, shift), scale));
    return power_of_two(fma(score, scale, shift));
  }
  // The same between two scores, both of which may be kNoScore.
  Vec between(Vec before, Vec maximum) const {
    const Vec less = mul(sub(before, maximum), scale);
    return sizeof(T) == sizeof(float) ? exponential(less) : power_of_two(less);
  }
};

// How rows of dtype T become operands of a GEMM.
template <class Outer, class T>
struct AttentionOperands {
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
  static bool is_in_place(int64_t rows, int64_t features) {
    return is_value(T{}) && padded(features) == features &&
           (!Outer::kWholeTiles || rows % Outer::kTileRows == 0);
  }
  static int64_t packed_values(int64_t rows, int64_t features) {
    return is_in_place(rows, features) ? 0 : round_up(rows, kStrip) * padded(features);
  }
  static Rows rows_of(const T* x, int64_t ld, int64_t rows, int64_t features, Value* buffer) {
    if (is_in_place(rows, features)) return {reinterpret_cast<const Value*>(x), ld};
    const int64_t depth = padded(features);
    for (int64_t i = 0; i < round_up(rows, kStrip); ++i) {
      Value* row = buffer + i * depth;
      if (i < rows) Outer::pack_lhs(x, view(x, ld).dtype, i * ld, features, row);
      const int64_t filled = i < rows ? features : 0;
      memset(row + filled, 0, (depth - filled) * sizeof(Value));
    }
    return {buffer, depth};
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
    if constexpr (kElements == 2) {
      nt_fill_thin_pairs(term, 0, rows, strip);
    } else {
      nt_fill_thin(term, 0, rows, strip);
    }
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
    if constexpr (kElements == 2) {
      store_bits(reinterpret_cast<uint32_t*>(strip + k * kStrip + c * kElements),
                 pair_lanes(first, second, Value{}));
      return;
    }
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
                        depth / kElements, adds, sums + r * sums_ld + c, sums_ld, no_prefetch(strip));
      }
    }
  }
};

// out[r, c] = x[c, r] * factor[r] for the first `rows` lanes of rows x[c], which are kStrip apart; factor may
// be null.
template <class T>
void transpose_strip(const float* x, const float* factor, int64_t rows, int64_t features, T* out,
                     int64_t ld) {
  for (int64_t r = 0; r < rows; r += kLanes) {
    const Vec by = factor ? load(factor + r) : splat(1.0f);
    const int64_t height = min64(kLanes, rows - r);
    const auto lanes_of = [&](int64_t c) { return mul(load(x + c * kStrip + r), by); };
    int64_t c = 0;
    Vec block[kLanes];
#if PEFT_KERNELS_BF16_DOT
    if constexpr (sizeof(T) != sizeof(float) && AttentionOperands<OuterBF16, T>::is_bf16(T{})) {
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
