// A step of AdamW, Adam or Lion: one pass over parameter, gradient and moments (ops/adamw.py has the
// meaning). No fused multiply-add, so that every level computes the same bits.

struct Moments {
  Vec m, v;
};

// The numbers of a step in all lanes.
struct StepNumbers {
  Vec factor, b1, w1, b2, w2, rate, floor, decay, weight_decay, lr;
  bool into_gradient;  // the decay
  StepNumbers(const StepParams& p, const StepTensor& t)
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
        into_gradient(p.kind == StepKind::kAdam && t.weight_decay != 0) {}
};

template <bool kLion>
inline Vec updated(const StepNumbers& n, Vec p, Vec g, Moments& x) {
  g = g * n.factor;
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

// Rounds bf16 as the options say: words, and compensation, may be null.
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

inline Vec load_moment(const uint8_t* codes, const float* map, Vec absmax, int64_t lanes) {
  uint8_t part[kLanes] = {};
  if (lanes < kLanes) memcpy(part, codes, lanes);
  return gather(map, load_codes(lanes < kLanes ? part : codes)) * absmax;
}

// Zero in both moments where one is not finite.
inline void drop_not_finite(float* m, float* v) {
  constexpr int32_t kInfinity = 0x7f800000;
  for (int64_t i = 0; i < kStateBlock; i += kLanes) {
    const VecN x = (VecN)load(m + i), y = (VecN)load(v + i);
    const VecN finite = ((x & 0x7fffffff) < kInfinity) & ((y & 0x7fffffff) < kInfinity);
    store(m + i, (Vec)(x & finite));
    store(v + i, (Vec)(y & finite));
  }
}

inline float absmax_of(const float* x) {
  VecI bits = zero_bits();
  for (int64_t i = 0; i < kStateBlock; i += kLanes) bits = max_abs_bits(bits, load(x + i));
  const int32_t most = reduce_max(bits);
  float out;
  memcpy(&out, &most, sizeof(out));
  return out;
}

inline Vec inverse_of(float absmax) {
  const float inverse = 1.0f / absmax;
  return splat(inverse > FLT_MAX ? 0 : inverse);
}

inline void store_code_lanes(uint8_t* codes, VecN found, int64_t lanes) {
  if (lanes == kLanes) return store_codes(codes, found);
  uint8_t part[kLanes];
  store_codes(part, found);
  memcpy(codes, part, lanes);
}

// The moments of a block that are computed and have to be written as codes. That is done while the next block
// is computed, vector by vector: here it is arithmetic that takes time, there division and root.
template <bool kLion>
struct CodedBlock {
  MidpointCounter counter1, counter2;
  const float *m, *v;
  Vec scale1, scale2;
  uint8_t *codes1, *codes2;
  int64_t count;

  CodedBlock() : counter1(kSignedSearch), counter2(kUnsignedSearch), count(0) {}
  void write(int64_t i) const {
    const int64_t lanes = min64(kLanes, count - i);
    store_code_lanes(codes1 + i, signed_codes(counter1, load(m + i) * scale1), lanes);
    if (!kLion) store_code_lanes(codes2 + i, counter2.count(load(v + i) * scale2), lanes);
  }
  void write_from(int64_t i) {
    for (; i < count; i += kLanes) write(i);
    count = 0;
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
  // Before those from `first` on, a multiple of kStateBlock.
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
  const StepNumbers numbers(p, t);
  StepElements<T> elements{p, t, {}};
  float *state1 = static_cast<float*>(t.state1), *state2 = static_cast<float*>(t.state2);
  for (int64_t block = begin; block < end; block += kStateBlock) {
    const int64_t count = min64(kStateBlock, end - block);
    elements.begin(block, count);
    for (int64_t i = 0; i < count; i += kLanes) {
      const int64_t e = block + i, lanes = min64(kLanes, count - i);
      Moments moments{load_lanes(state1 + e, lanes), kLion ? zero() : load_lanes(state2 + e, lanes)};
      const Vec param =
          updated<kLion>(numbers, elements.load_param(e, lanes), elements.load_grad(e, lanes), moments);
      elements.store_param(e, i, param, lanes);
      store_lanes(state1 + e, moments.m, lanes);
      if (!kLion) store_lanes(state2 + e, moments.v, lanes);
    }
  }
}

template <class T, bool kLion>
void step_8bit(const StepParams& p, const StepTensor& t, int64_t begin, int64_t end) {
  const StepNumbers numbers(p, t);
  StepElements<T> elements{p, t, {}};
  uint8_t *codes1 = static_cast<uint8_t*>(t.state1), *codes2 = static_cast<uint8_t*>(t.state2);
  alignas(64) float moments_of[2][2][kStateBlock] = {};  // of this block and of the one before
  CodedBlock<kLion> before;
  for (int64_t block = begin; block < end; block += kStateBlock) {
    const int64_t count = min64(kStateBlock, end - block), index = block / kStateBlock;
    float *m = moments_of[index % 2][0], *v = moments_of[index % 2][1];
    if (count < kStateBlock) memset(m, 0, 2 * kStateBlock * sizeof(*m));
    elements.begin(block, count);
    const Vec absmax1 = splat(t.absmax1[index]), absmax2 = kLion ? zero() : splat(t.absmax2[index]);
    int64_t i = 0;
    for (; i < count; i += kLanes) {
      const int64_t e = block + i, lanes = min64(kLanes, count - i);
      Moments moments{load_moment(codes1 + e, nf4::kDynamicMap, absmax1, lanes),
                      kLion ? zero() : load_moment(codes2 + e, kUnsignedDynamicMap, absmax2, lanes)};
      const Vec param =
          updated<kLion>(numbers, elements.load_param(e, lanes), elements.load_grad(e, lanes), moments);
      elements.store_param(e, i, param, lanes);
      store_lanes(m + i, moments.m, lanes);
      if (!kLion) store_lanes(v + i, moments.v, lanes);
      if (before.count) before.write(i);
    }
    before.write_from(i);
    float most1 = absmax_of(m), most2 = kLion ? 0 : absmax_of(v);
    if (!(most1 <= FLT_MAX && most2 <= FLT_MAX)) {
      drop_not_finite(m, v);
      most1 = absmax_of(m);
      most2 = absmax_of(v);
    }
    t.absmax1[index] = most1;
    before.m = m;
    before.v = v;
    before.scale1 = inverse_of(most1);
    before.codes1 = codes1 + block;
    before.count = count;
    if (kLion) continue;
    t.absmax2[index] = most2;
    before.scale2 = inverse_of(most2);
    before.codes2 = codes2 + block;
  }
  before.write_from(0);
}

void step(const StepParams& p, const StepTensor& t, int64_t begin, int64_t end) {
  with_type(t.dtype, [&](auto type) {
    using T = decltype(type);
    const bool is_lion = p.kind == StepKind::kLion;
    if (t.absmax1) {
      is_lion ? step_8bit<T, true>(p, t, begin, end) : step_8bit<T, false>(p, t, begin, end);
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
