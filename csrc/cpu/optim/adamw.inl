// A step of AdamW, Adam or Lion: one pass over parameter, gradient and moments (defined in
// ops/optim/adamw.py). Without fused multiply-adds, so that every ISA computes the same bits.

struct Moments {
  Vec m, v;
};

// The coefficients of a step, broadcast.
struct StepCoefficients {
  Vec factor, b1, w1, b2, w2, rate, floor, decay, weight_decay, lr;
  bool has_factor, into_gradient;  // into_gradient: weight decay is added to the gradient
  StepCoefficients(const StepParams& p, const StepTensor& t)
      : factor(splat(p.factor)),
        b1(splat(t.b1)),
        w1(splat(t.w1)),
        b2(splat(t.b2)),
        w2(splat(t.w2)),
        rate(splat(t.rate)),
        floor(splat(t.floor)),
        decay(splat(t.decay)),
        weight_decay(splat(t.weight_decay)),
        lr(splat(t.lr)),
        has_factor(p.factor != 1),
        into_gradient(p.kind == StepKind::kAdam && t.weight_decay != 0) {}
};

template <bool kLion>
inline Vec updated(const StepCoefficients& n, Vec p, Vec g, Moments& x) {
  if (n.has_factor) g = g * n.factor;
  if (n.into_gradient) g = g + p * n.weight_decay;
  p = p * n.decay;
  if constexpr (kLion) {
    const Vec u = x.m * n.b1 + g * n.w1;
    const Vec one = splat(1.0f);
    const Vec sign = u > 0 ? one : (u < 0 ? negate(one) : u);
    x.m = x.m * n.b2 + g * n.w2;
    return p - sign * n.lr;
  }
  x.m = x.m * n.b1 + g * n.w1;
  x.v = x.v * n.b2 + (g * n.w2) * g;
  return p + (x.m / (square_root(x.v) + n.floor)) * n.rate;
}

// Rounds to bf16, stochastically if `words` is given, with the error kept in `compensation` if given.
inline void round_bf16(BF16* param, BF16* compensation, const uint32_t* words, Vec x, int64_t lanes) {
  float exact[kLanes];
  store(exact, x);
  BF16 rounded[kLanes];
  store(rounded, x);
  for (int64_t i = 0; words && i < lanes; ++i) {
    uint32_t bits;
    memcpy(&bits, exact + i, sizeof(bits));
    if (exact[i] == exact[i]) rounded[i].bits = static_cast<uint16_t>((bits + (words[i] >> 16)) >> 16);
  }
  memcpy(param, rounded, lanes * sizeof(BF16));
  if (compensation) store_lanes(compensation, x - load(rounded), lanes);
}

// Zeroes both moments where one is not finite.
template <bool kLion>
inline void zero_non_finite(float* m, float* v) {
  constexpr int32_t kInfinity = 0x7f800000;
  for (int64_t i = 0; i < kStateBlock; i += kLanes) {
    const VecN x = (VecN)load(m + i), y = kLion ? VecN{} : (VecN)load(v + i);
    const VecN finite = ((x & 0x7fffffff) < kInfinity) & ((y & 0x7fffffff) < kInfinity);
    store(m + i, (Vec)(x & finite));
    if (!kLion) store(v + i, (Vec)(y & finite));
  }
}

// out = map[codes] * absmax for a block of `count`, and zeros up to its end.
template <bool kWhole>
inline void decode_block(const Codebook& book, const uint8_t* codes, float absmax, int64_t count,
                         float* out) {
  uint8_t padded[kStateBlock];
  if (!kWhole) {
    memset(padded, 0, sizeof(padded));
    codes = static_cast<const uint8_t*>(memcpy(padded, codes, count));
  }
  for (int64_t i = 0; i < kStateBlock; i += kCodeRun) book.decode(codes + i, splat(absmax), out + i);
  if (!kWhole) memset(out + count, 0, (kStateBlock - count) * sizeof(*out));
}

// A block whose new moments are computed but not yet encoded.
template <bool kLion>
struct PendingBlock {
  const CodeFinder<true> finder1{kSignedCodes};
  const CodeFinder<false> finder2{kUnsignedCodes};
  const float *m, *v;
  Vec scale1, scale2;
  uint8_t *codes1, *codes2;
  int64_t count = 0;

  // Encodes a whole run.
  void write(int64_t i) const {
    finder1.write(m + i, scale1, codes1 + i);
    if (!kLion) finder2.write(v + i, scale2, codes2 + i);
  }
  void write_all() const {
    for (int64_t i = 0; i < count; i += kCodeRun) {
      if (count - i >= kCodeRun) {
        write(i);
        continue;
      }
      uint8_t run[kCodeRun];
      finder1.write(m + i, scale1, run);
      memcpy(codes1 + i, run, count - i);
      if (kLion) continue;
      finder2.write(v + i, scale2, run);
      memcpy(codes2 + i, run, count - i);
    }
  }
};

template <class T>
constexpr bool kIsBF16 = false;
template <>
constexpr bool kIsBF16<BF16> = true;

// How the elements of one parameter are loaded and rounded.
template <class T>
struct StepElements {
  const StepParams& p;
  const StepTensor& t;
  uint32_t words[kStateBlock + kLanes];

  bool is_plain() const { return !kIsBF16<T> || !(t.compensation || p.stochastic); }
  // Call before the elements from `first` on, a multiple of kStateBlock.
  void begin(int64_t first, int64_t count) {
    if (is_plain() || !p.stochastic) return;
    const DropoutMask mask{p.seed, t.stream, 0, 1, 0, t.step};
    for_mask(mask, first, count, [&](int64_t at, const uint32_t* from, int64_t piece) {
      memcpy(words + at, from, piece * sizeof(*words));
    });
  }
  Vec load_param(int64_t e, int64_t lanes) const {
    const Vec x = load_lanes(static_cast<const T*>(t.param) + e, lanes);
    return t.compensation ? x + load_lanes(t.compensation + e, lanes) : x;
  }
  Vec load_grad(int64_t e, int64_t lanes) const {
    return load_lanes(static_cast<const T*>(t.grad) + e, lanes);
  }
  void store_param(int64_t e, int64_t in_block, Vec x, int64_t lanes) {
    T* param = static_cast<T*>(t.param) + e;
    if constexpr (kIsBF16<T>) {
      if (!is_plain()) {
        BF16* compensation = t.compensation ? t.compensation + e : nullptr;
        return round_bf16(param, compensation, p.stochastic ? words + in_block : nullptr, x, lanes);
      }
    }
    store_lanes(param, x, lanes);
  }
};

template <class T, bool kLion>
void step_32bit(const StepParams& p, const StepTensor& t, int64_t begin, int64_t end) {
  const StepCoefficients coefficients(p, t);
  StepElements<T> elements{p, t, {}};
  float *state1 = static_cast<float*>(t.state1), *state2 = static_cast<float*>(t.state2);
  for (int64_t block = begin; block < end; block += kStateBlock) {
    const int64_t count = min64(kStateBlock, end - block);
    elements.begin(block, count);
    for (int64_t i = 0; i < count; i += kLanes) {
      const int64_t e = block + i, lanes = min64(kLanes, count - i);
      Moments moments{load_lanes(state1 + e, lanes), kLion ? zero() : load_lanes(state2 + e, lanes)};
      const Vec param =
          updated<kLion>(coefficients, elements.load_param(e, lanes), elements.load_grad(e, lanes), moments);
      elements.store_param(e, i, param, lanes);
      store_lanes(state1 + e, moments.m, lanes);
      if (!kLion) store_lanes(state2 + e, moments.v, lanes);
    }
  }
}

// Blocks are processed in sequence. The codes of a block are written while the next one is computed, vector
// by vector, which overlaps the integer work of encoding with the latency of division and square root.
template <class T, bool kLion>
struct Step8bit {
  const StepCoefficients coefficients;
  StepElements<T> elements;
  const StepTensor& t;
  uint8_t *const codes1, *const codes2;
  const Codebook book1{nf4::kDynamicMap}, book2{kSecondMoments.value};
  PendingBlock<kLion> pending;
  alignas(64) float moments[2][2][kStateBlock];  // of this block and of the previous one

  Step8bit(const StepParams& p, const StepTensor& tensor)
      : coefficients(p, tensor),
        elements{p, tensor, {}},
        t(tensor),
        codes1(static_cast<uint8_t*>(t.state1)),
        codes2(static_cast<uint8_t*>(t.state2)) {}

  void run(int64_t begin, int64_t end) {
    for (; begin + kStateBlock <= end; begin += kStateBlock) block<true>(begin, kStateBlock);
    if (begin < end) block<false>(begin, end - begin);
    pending.write_all();
  }

  // The previous block, if any, is whole.
  template <bool kWhole>
  void block(int64_t first, int64_t count) {
    const int64_t index = first / kStateBlock;
    float *m = moments[index % 2][0], *v = moments[index % 2][1];
    elements.begin(first, count);
    decode_block<kWhole>(book1, codes1 + first, t.absmax1[index], count, m);
    if (!kLion) decode_block<kWhole>(book2, codes2 + first, t.absmax2[index], count, v);
    VecI bits1 = zero_bits(), bits2 = zero_bits();
    for (int64_t run = 0; run < (kWhole ? kStateBlock : count); run += kCodeRun) {
      for (int64_t i = run; i < run + kCodeRun; i += kLanes) {
        if (!kWhole && i >= count) break;
        const int64_t e = first + i, lanes = kWhole ? kLanes : min64(kLanes, count - i);
        Moments x{load(m + i), kLion ? zero() : load(v + i)};
        const Vec param =
            updated<kLion>(coefficients, elements.load_param(e, lanes), elements.load_grad(e, lanes), x);
        elements.store_param(e, i, param, lanes);
        store(m + i, x.m);
        bits1 = max_abs_bits(bits1, x.m);
        if (kLion) continue;
        store(v + i, x.v);
        bits2 = max_bits(bits2, x.v);
      }
      if (kWhole && pending.count) pending.write(run);
    }
    if (!kWhole) pending.write_all();

    float maximum1 = as_float(reduce_max(bits1)), maximum2 = as_float(reduce_max(bits2));
    if (!(maximum1 <= FLT_MAX && maximum2 <= FLT_MAX)) {
      zero_non_finite<kLion>(m, v);
      maximum1 = absmax_of(m);
      maximum2 = kLion ? 0 : absmax_of(v);
    }
    t.absmax1[index] = maximum1;
    pending.m = m;
    pending.v = v;
    pending.scale1 = splat(inverse_of(maximum1));
    pending.codes1 = codes1 + first;
    pending.count = count;
    if (kLion) return;
    t.absmax2[index] = maximum2;
    pending.scale2 = splat(inverse_of(maximum2));
    pending.codes2 = codes2 + first;
  }
};

void step(const StepParams& p, const StepTensor& t, int64_t begin, int64_t end) {
  with_type(t.dtype, [&](auto type) {
    using T = decltype(type);
    const bool is_lion = p.kind == StepKind::kLion;
    if (t.absmax1) {
      is_lion ? Step8bit<T, true>(p, t).run(begin, end) : Step8bit<T, false>(p, t).run(begin, end);
    } else {
      is_lion ? step_32bit<T, true>(p, t, begin, end) : step_32bit<T, false>(p, t, begin, end);
    }
  });
}

double squares(const void* x, DType dtype, float factor, int64_t begin, int64_t end) {
  typedef double VecD __attribute__((vector_size(8 * kLanes)));
  VecD sums{};
  with_type(dtype, [&](auto type) {
    const auto* values = static_cast<const decltype(type)*>(x);
    for_lanes(begin, end, [&](int64_t i, int64_t lanes) {
      const VecD wide = __builtin_convertvector(load_lanes(values + i, lanes), VecD) * double{factor};
      sums += wide * wide;
    });
  });
  double sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += sums[i];
  return sum;
}
