// DoRA's magnitudes: scales columns of z except for the bias, and the gradients.

template <class T>
void scale_features_run(const ScaleParams& p, int64_t begin, int64_t end) {
  for (int64_t m = begin; m < end; ++m) {
    const T* z = static_cast<const T*>(p.z) + m * p.n;
    T* y = static_cast<T*>(p.y) + m * p.n;
    for_lanes(0, p.n, [&](int64_t i, int64_t count) {
      const Vec in = load_lanes(z + i, count), scale = load_lanes(p.scale + i, count);
      if (!p.bias) return store_lanes(y + i, mul(in, scale), count);
      const Vec unbiased = sub(in, load_lanes(p.bias + i, count));
      store_lanes(y + i, fma(unbiased, sub(scale, splat(1.0f)), in), count);
    });
  }
}

// Columns [begin, end), kScaleStrip at a time; sums over rows are chained as in linear_outer.inl.
constexpr int64_t kScaleStrip = 64;

template <class T>
void scale_features_backward_run(const ScaleParams& p, int64_t begin, int64_t end) {
  constexpr int64_t kChain = 32;
  for (int64_t n0 = begin; n0 < end; n0 += kScaleStrip) {
    const int64_t cols = min64(kScaleStrip, end - n0);
    float total[kScaleStrip] = {};
    for (int64_t m0 = 0; m0 < p.m; m0 += kChain) {
      float chain[kScaleStrip] = {};
      for (int64_t m = m0; m < min64(m0 + kChain, p.m); ++m) {
        const int64_t first = m * p.n + n0;
        const T *z = static_cast<const T*>(p.z) + first, *dy = static_cast<const T*>(p.dy) + first;
        T* dz = static_cast<T*>(p.dz) + first;
        for_lanes(0, cols, [&](int64_t i, int64_t count) {
          const Vec d = load_lanes(dy + i, count);
          store_lanes(dz + i, mul(d, load_lanes(p.scale + n0 + i, count)), count);
          const Vec bias = p.bias ? load_lanes(p.bias + n0 + i, count) : zero();
          store(chain + i, fma(d, sub(load_lanes(z + i, count), bias), load(chain + i)));
        });
      }
      for (int64_t i = 0; i < kScaleStrip; ++i) total[i] += chain[i];
    }
    memcpy(p.d_scale + n0, total, cols * sizeof(float));
  }
}

void scale_features(const ScaleParams& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto type) { scale_features_run<decltype(type)>(p, begin, end); });
}

void scale_features_backward(const ScaleParams& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto type) { scale_features_backward_run<decltype(type)>(p, begin, end); });
}
