// Rows divided by the root of the mean of their squares, times a weight, and the gradients.

// term(i, count, sum) gives the sum with what lanes [i, i + count) of a row add to it.
template <class Term>
inline float sum_lanes(int64_t features, const Term& term) {
  constexpr int kChains = 4;
  Vec sums[kChains] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + kChains * kLanes <= features; i += kChains * kLanes) {
    for (int c = 0; c < kChains; ++c) sums[c] = term(i + c * kLanes, kLanes, sums[c]);
  }
  for (; i < features; i += kLanes) sums[0] = term(i, min64(kLanes, features - i), sums[0]);
  float lanes[kLanes];
  store(lanes, add(add(sums[0], sums[1]), add(sums[2], sums[3])));
  float total = 0.0f;
  for (int lane = 0; lane < kLanes; ++lane) total += lanes[lane];
  return total;
}

template <class T, class Out>
void rms_norm_run(const RmsNormParams& p, int64_t begin, int64_t end) {
  for (int64_t m = begin; m < end; ++m) {
    const T* x = static_cast<const T*>(p.x) + m * p.features;
    Out* out = static_cast<Out*>(p.out) + m * p.features;
    const float squares = sum_lanes(p.features, [&](int64_t i, int64_t count, Vec sum) {
      const Vec one = load_lanes(x + i, count);
      return fma(one, one, sum);
    });
    float root[kLanes];
    store(root, square_root(splat(squares / p.features + p.eps)));
    const float rstd = 1.0f / root[0];
    p.rstd[m] = rstd;
    for_lanes(0, p.features, [&](int64_t i, int64_t count) {
      const Vec normed = rounded<T>(mul(load_lanes(x + i, count), splat(rstd)));
      store_lanes(out + i, mul(load_lanes(p.weight + i, count), normed), count);
    });
  }
}

template <class T, class Out>
void rms_norm_backward_run(const RmsNormParams& p, int64_t begin, int64_t end) {
  if (p.sums) memset(p.sums, 0, p.features * sizeof(float));
  for (int64_t m = begin; m < end; ++m) {
    const T* x = static_cast<const T*>(p.x) + m * p.features;
    const Out* dy = static_cast<const Out*>(p.dy) + m * p.features;
    const Vec rstd = splat(p.rstd[m]);
    if (p.sums) {
      for_lanes(0, p.features, [&](int64_t i, int64_t count) {
        const Vec normed = rounded<T>(mul(load_lanes(x + i, count), rstd));
        const Vec sum = fma(load_lanes(dy + i, count), normed, load_lanes(p.sums + i, count));
        store_lanes(p.sums + i, sum, count);
      });
    }
    if (!p.dx) continue;
    const float product = sum_lanes(p.features, [&](int64_t i, int64_t count, Vec sum) {
      const Vec d = mul(load_lanes(dy + i, count), load_lanes(p.weight + i, count));
      return fma(d, mul(load_lanes(x + i, count), rstd), sum);
    });
    const Vec mean = splat(product / p.features);
    T* dx = static_cast<T*>(p.dx) + m * p.features;
    for_lanes(0, p.features, [&](int64_t i, int64_t count) {
      const Vec d = mul(load_lanes(dy + i, count), load_lanes(p.weight + i, count));
      const Vec normed = mul(load_lanes(x + i, count), rstd);
      store_lanes(dx + i, mul(rstd, sub(d, mul(normed, mean))), count);
    });
  }
}

// Calls run with a value of x's type and one of the result's, which is the same or fp32.
template <class Run>
void with_norm_types(const RmsNormParams& p, const Run& run) {
  with_type(p.dtype, [&](auto type) { p.out_dtype == p.dtype ? run(type, type) : run(type, float{}); });
}

void rms_norm(const RmsNormParams& p, int64_t begin, int64_t end) {
  with_norm_types(p,
                  [&](auto type, auto out) { rms_norm_run<decltype(type), decltype(out)>(p, begin, end); });
}

void rms_norm_backward(const RmsNormParams& p, int64_t begin, int64_t end) {
  with_norm_types(
      p, [&](auto type, auto out) { rms_norm_backward_run<decltype(type), decltype(out)>(p, begin, end); });
}
