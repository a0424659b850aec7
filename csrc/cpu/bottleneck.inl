// What a bottleneck adapter computes beside its products: layer norm, activation with dropout, the residual.

// The sum of row[i] * other[i], or of row alone where other is null, over `count` elements.
inline float sum_row(const float* row, const float* other, int64_t count) {
  constexpr int kChains = 4;
  Vec sums[kChains] = {zero(), zero(), zero(), zero()};
  int chain = 0;
  for_lanes(0, count, [&](int64_t i, int64_t lanes) {
    const Vec x = load_lanes(row + i, lanes);
    sums[chain] = other ? fma(x, load_lanes(other + i, lanes), sums[chain]) : add(x, sums[chain]);
    chain = (chain + 1) % kChains;
  });
  float lanes[kLanes];
  store(lanes, add(add(sums[0], sums[1]), add(sums[2], sums[3])));
  float total = 0.0f;
  for (int i = 0; i < kLanes; ++i) total += lanes[i];
  return total;
}

// out = (x - mean) * rstd; returns rstd.
template <class T>
float standardise(const T* x, int64_t features, float eps, float* out) {
  widen_run(x, features, 1.0f, out);
  const Vec mean = splat(sum_row(out, nullptr, features) / features);
  for_lanes(0, features,
            [&](int64_t i, int64_t n) { store_lanes(out + i, sub(load_lanes(out + i, n), mean), n); });
  float root[kLanes];
  store(root, square_root(splat(sum_row(out, out, features) / features + eps)));
  const float rstd = 1.0f / root[0];
  for_lanes(0, features,
            [&](int64_t i, int64_t n) { store_lanes(out + i, mul(load_lanes(out + i, n), splat(rstd)), n); });
  return rstd;
}

template <class T>
void layer_norm_run(const NormParams& p, int64_t begin, int64_t end) {
  for (int64_t m = begin; m < end; ++m) {
    float* out = p.out + (m - begin) * p.features;
    standardise(static_cast<const T*>(p.x) + m * p.features, p.features, p.eps, out);
    for_lanes(0, p.features, [&](int64_t i, int64_t n) {
      const Vec bias = p.bias ? load_lanes(p.bias + i, n) : zero();
      store_lanes(out + i, fma(load_lanes(out + i, n), load_lanes(p.weight + i, n), bias), n);
    });
  }
}

template <class T>
void layer_norm_backward_run(const NormParams& p, int64_t begin, int64_t end) {
  float *standard = p.out, *scaled = p.out + p.features;
  float *d_weight = p.sums, *d_bias = p.sums + p.features;
  memset(p.sums, 0, 2 * p.features * sizeof(float));
  for (int64_t m = begin; m < end; ++m) {
    const int64_t first = m * p.features;
    const float rstd = standardise(static_cast<const T*>(p.x) + first, p.features, p.eps, standard);
    const float* d = p.d + first;
    for_lanes(0, p.features, [&](int64_t i, int64_t n) {
      const Vec one = load_lanes(d + i, n);
      store_lanes(scaled + i, mul(one, load_lanes(p.weight + i, n)), n);
      store_lanes(d_weight + i, fma(one, load_lanes(standard + i, n), load_lanes(d_weight + i, n)), n);
      store_lanes(d_bias + i, add(one, load_lanes(d_bias + i, n)), n);
    });
    if (!p.dx) continue;
    const Vec mean = splat(sum_row(scaled, nullptr, p.features) / p.features),
              slope = splat(sum_row(scaled, standard, p.features) / p.features);
    const T* dy = p.dy ? static_cast<const T*>(p.dy) + first : nullptr;
    for_lanes(0, p.features, [&](int64_t i, int64_t n) {
      const Vec inner = sub(sub(load_lanes(scaled + i, n), mean), mul(load_lanes(standard + i, n), slope));
      const Vec start = dy ? load_lanes(dy + i, n) : zero();
      store_lanes(static_cast<T*>(p.dx) + first + i, fma(inner, splat(rstd), start), n);
    });
  }
}

void layer_norm(const NormParams& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto type) { layer_norm_run<decltype(type)>(p, begin, end); });
}

void layer_norm_backward(const NormParams& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto type) { layer_norm_backward_run<decltype(type)>(p, begin, end); });
}

template <Activation kActivation>
void bottleneck_run(const BottleneckParams& p, int64_t begin, int64_t end) {
  const auto step = [&](int64_t i, int64_t count, Vec keep) {
    const ValueSlope a = activate<kActivation>(load_lanes(p.z + i, count));
    if (p.value) store_lanes(p.value + (i - begin), mul(a.value, keep), count);
    if (p.d) store_lanes(p.d + i, mul(mul(load_lanes(p.d + i, count), keep), a.slope), count);
  };
  if (p.mask.threshold == 0) {
    return for_lanes(begin, end, [&](int64_t i, int64_t count) { step(i, count, splat(1.0f)); });
  }
  for_mask(p.mask, begin, end - begin, [&](int64_t at, const uint32_t* words, int64_t piece) {
    for (int64_t i = 0; i < piece; i += kLanes) {
      step(begin + at + i, min64(kLanes, piece - i), keep_factors(words + i, p.mask.threshold, p.mask.scale));
    }
  });
}

void bottleneck(const BottleneckParams& p, int64_t begin, int64_t end) {
  with_activation(p.activation,
                  [&](auto activation) { bottleneck_run<decltype(activation)::kValue>(p, begin, end); });
}

// A sum in which adding a zero of either sign changes no bit: where the residual is negative, -0 included,
// the signs of all are turned.
template <class T>
void add_residual_run(const ResidualParams& p, int64_t begin, int64_t end) {
  const T* residual = static_cast<const T*>(p.residual);
  T* y = static_cast<T*>(p.y);
  for_lanes(begin, end, [&](int64_t i, int64_t count) {
    const Vec r = load_lanes(residual + i, count), d = load_lanes(p.delta + (i - begin), count);
    store_lanes(y + i, by_sign(r, negate(sub(negate(r), d)), add(r, d)), count);
  });
}

void add_residual(const ResidualParams& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto type) { add_residual_run<decltype(type)>(p, begin, end); });
}
