// Helpers shared by all families: the dtype switch, loops over vectors, e^x, reductions of a row.

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline constexpr int64_t max64(int64_t a, int64_t b) { return a < b ? b : a; }
inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }

inline float float_of_bits(uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}

inline int64_t element_bytes(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

// Calls use with a value of the C++ type of `dtype`.
template <class Use>
inline void with_type(DType dtype, const Use& use) {
  switch (dtype) {
    case DType::kF32:
      return use(float{});
    case DType::kBF16:
      return use(BF16{});
    case DType::kF16:
      return use(F16{});
  }
}

// Calls step(index, count) for each vector of [begin, end); count is kLanes except for the last one.
template <class Step>
inline void for_lanes(int64_t begin, int64_t end, const Step& step) {
  for (int64_t i = begin; i < end; i += kLanes) step(i, min64(kLanes, end - i));
}

template <class T>
inline Vec load_lanes(const T* p, int64_t count) {
  return count == kLanes ? load(p) : load_part(p, count);
}
template <class T>
inline void store_lanes(T* p, Vec x, int64_t count) {
  count == kLanes ? store(p, x) : store_part(p, x, count);
}

// x as it would be read back after being stored as T.
template <class T>
inline Vec rounded(Vec x) {
  T stored[kLanes];
  store(stored, x);
  return load(stored);
}
template <>
inline Vec rounded<float>(Vec x) {
  return x;
}

inline Vec negate(Vec x) { return sub(splat(-0.0f), x); }

// e^x within 2 ulp, clamped to the normal numbers; NaN propagates.
inline Vec exponential(Vec x) {
  x = max(splat(-87.0f), min(splat(88.0f), x));
  // x = n ln 2 + r. Adding 1.5 * 2^23 rounds to an integer, which lands in the low bits, biased as an
  // exponent.
  const Vec shift = splat(12582912.0f + 127.0f);
  const Vec shifted = fma(x, splat(1.44269504089f), shift);
  const Vec n = sub(shifted, shift);
  const Vec r = fma(n, splat(-1.42860677e-6f), fma(n, splat(-0.693145752f), x));
  Vec sum = splat(1.0f / 5040);
  sum = fma(sum, r, splat(1.0f / 720));
  sum = fma(sum, r, splat(1.0f / 120));
  sum = fma(sum, r, splat(1.0f / 24));
  sum = fma(sum, r, splat(1.0f / 6));
  sum = fma(sum, r, splat(0.5f));
  sum = fma(sum, r, splat(1.0f));
  sum = fma(sum, r, splat(1.0f));
  return mul(sum, low_bits_to_exponent(shifted));
}

inline float exponential(float x) {
  float lanes[kLanes];
  store(lanes, exponential(splat(x)));
  return lanes[0];
}

inline float sum_lanes(Vec x) {
  float lanes[kLanes], total = 0.0f;
  store(lanes, x);
  for (int i = 0; i < kLanes; ++i) total += lanes[i];
  return total;
}

template <class T>
void widen_run(const T* x, int64_t count, float scale, float* out) {
  const Vec s = splat(scale);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, mul(load(x + i), s));
  if (i < count) store_part(out + i, mul(load_part(x + i, count - i), s), count - i);
}

// Elements [first, first + count) of a dense array, times `scale`, as fp32.
inline void widen_run(const void* x, DType dtype, int64_t first, int64_t count, float scale, float* out) {
  with_type(dtype,
            [&](auto type) { widen_run(static_cast<const decltype(type)*>(x) + first, count, scale, out); });
}

template <class T>
void narrow_run(const float* x, int64_t count, T* out) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(out + i, load(x + i));
  if (i < count) store_part(out + i, load_part(x + i, count - i), count - i);
}

// The last vector of a row whose length is not a multiple of the lanes, padded.
inline Vec load_padded(const float* row, int64_t count, float padding) {
  if (count == kLanes) return load(row);
  float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = i < count ? row[i] : padding;
  return load(lanes);
}

inline float row_max(const float* row, int64_t cols, float start) {
  Vec maxima[2] = {splat(start), splat(start)};
  for_lanes(0, cols, [&](int64_t i, int64_t n) {
    Vec& m = maxima[i / kLanes % 2];
    m = max(m, load_padded(row + i, n, start));
  });
  float lanes[kLanes], found = start;
  store(lanes, max(maxima[0], maxima[1]));
  for (int i = 0; i < kLanes; ++i) found = lanes[i] > found ? lanes[i] : found;
  return found;
}

// The sum of row[i] * other[i], or of row alone if other is null.
inline float sum_row(const float* row, const float* other, int64_t count) {
  constexpr int kChains = 4;
  Vec sums[kChains] = {zero(), zero(), zero(), zero()};
  int chain = 0;
  for_lanes(0, count, [&](int64_t i, int64_t lanes) {
    const Vec x = load_lanes(row + i, lanes);
    sums[chain] = other ? fma(x, load_lanes(other + i, lanes), sums[chain]) : add(x, sums[chain]);
    chain = (chain + 1) % kChains;
  });
  return sum_lanes(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}
