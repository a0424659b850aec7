// Decodes and finds codes of the dynamic maps (dynamic_tables.h).

#if !PEFT_KERNELS_PERMUTES_BYTES
// Plain loads are as fast as gathers, and faster where those are microcoded.
class Codebook {
 public:
  explicit Codebook(const float* values) : values_(values) {}
  // out[i] = values[codes[i]] * scale, kCodeRun of them.
  void decode(const uint8_t* codes, Vec scale, float* out) const {
    float found[kCodeRun];
    for (int i = 0; i < kCodeRun; ++i) found[i] = values_[codes[i]];
    for (int i = 0; i < kCodeRun; i += kLanes) store(out + i, load(found + i) * scale);
  }

 private:
  const float* values_;
};

constexpr int kFoundTogether = 1;
inline bool any_without(const VecN (&x)[1], int32_t bits) { return any_without(x[0], bits); }
inline VecN third_byte(VecN x) { return x >> 16 & 0xff; }
inline void store_codes(uint8_t* out, const VecN (&found)[1]) { store_low_bytes(out, third_byte(found[0])); }
inline void store_signed_codes(uint8_t* out, const VecN (&found)[1], const float* signs) {
  const VecN zero = VecN{} + kSignedZero, code = third_byte(found[0]), kept = code + (code > kSignedZero);
  store_low_bytes(out, (VecN)by_sign(load(signs), (Vec)(zero - kept), (Vec)(zero + code)));
}
#endif

// The codes of values of magnitude 0 to 1, plus rounding: how many midpoints a value exceeds. With kSigned,
// 127 is the code of 0, and below it a tie takes the code farther from 0, so a midpoint itself counts as
// exceeded. There is no -1: the values nearest to it take the last code.
template <bool kSigned>
class CodeFinder {
 public:
  explicit CodeFinder(const CodeSearch& search)
      : tables_(search),
        first_(splat(search.first)),
        limit_(splat(search.limit)),
        base_(splat(search.base)),
        least_(splat(search.least)),
        floors_(search.floors) {}

  // The codes of x[i] * scale, kCodeRun of them.
  void write(const float* x, Vec scale, uint8_t* codes) const {
    constexpr int kValues = kFoundTogether * kLanes;
    for (int i = 0; i < kCodeRun; i += kValues) {
      VecN found[kFoundTogether];
      for (int j = 0; j < kFoundTogether; ++j)
        found[j] = fixed_point(magnitude(load(x + i + j * kLanes) * scale));
      if (__builtin_expect(any_without(found, kSafeFractionBits), 0)) {
        for (int j = 0; j < kFoundTogether; ++j) {
          found[j] = compare_with_midpoint(magnitude(load(x + i + j * kLanes) * scale), found[j]);
        }
      }
      if constexpr (kSigned) {
        store_signed_codes(codes + i, found, x + i);
      } else {
        store_codes(codes + i, found);
      }
    }
  }

 private:
  // The fraction is 8 or more if any of these bits is set. Unsigned codes have been shifted.
  static constexpr int32_t kSafeFractionBits = kSigned ? 0xfff8 : 0xfff0;

  static Vec magnitude(Vec x) {
    if constexpr (!kSigned) return x;
    const VecN bits = (VecN)x & 0x7fffffff;
    return by_sign(x, (Vec)(bits + 1), (Vec)bits);
  }
  // Per lane: the fraction in the lower half, the code in the byte above it.
  VecN fixed_point(Vec x) const {
    const VecN passed = tables_.passed(x);
    const Vec y = min(limit_, fma(x, tables_.slope(passed), first_));
    const Vec sum = (Vec)((VecN)y + SearchTables::in_exponent(passed)) + base_;
    if constexpr (kSigned) return (VecN)sum;
    return (VecN)max(least_, sum) << 1;
  }
  // Compares with the midpoint, where rounding might decide.
  VecN compare_with_midpoint(Vec x, VecN fixed_point) const {
    VecN code = fixed_point >> 16 & 0xff;
    code -= 1 + (x > gather(floors_, code));
    return code << 16;
  }

  SearchTables tables_;
  Vec first_, limit_, base_, least_;
  const float* floors_;
};

inline float as_float(int32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

// The absmax of a block of kStateBlock values.
inline float absmax_of(const float* x) {
  VecI bits = zero_bits();
  for (int64_t i = 0; i < kStateBlock; i += kLanes) bits = max_abs_bits(bits, load(x + i));
  return as_float(reduce_max(bits));
}

// 1 / absmax, or 0 where that overflows.
inline float inverse_of(float absmax) {
  const float inverse = 1.0f / absmax;
  return inverse > FLT_MAX ? 0.0f : inverse;
}
