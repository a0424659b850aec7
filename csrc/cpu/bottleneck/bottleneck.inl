// The parts of a bottleneck adapter other than its GEMMs: layer norm, and activation with dropout.

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
              projection = splat(sum_row(scaled, standard, p.features) / p.features);
    const T* dy = p.dy ? static_cast<const T*>(p.dy) + first : nullptr;
    for_lanes(0, p.features, [&](int64_t i, int64_t n) {
      const Vec inner =
          sub(sub(load_lanes(scaled + i, n), mean), mul(load_lanes(standard + i, n), projection));
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
  const auto step = [&](int64_t i, int64_t count, Vec factor) {
    const ValueAndGradient a = activate<kActivation>(load_lanes(p.z + i, count));
    const Vec value = mul(a.value, factor);
    if (p.value) store_lanes(p.value + (i - begin), value, count);
    if (p.rounded_value) store_lanes(p.rounded_value + (i - begin), value, count);
    if (!p.d) return;
    const Vec d = mul(mul(load_lanes(p.d + i, count), factor), a.gradient);
    store_lanes(p.d + i, d, count);
    if (p.rounded_d) store_lanes(p.rounded_d + (i - begin), d, count);
  };
  if (p.mask.threshold == 0) {
    const Vec factor = splat(p.scaling);
    return for_lanes(begin, end, [&](int64_t i, int64_t count) { step(i, count, factor); });
  }
  const float kept = p.mask.scale * p.scaling;
  for_mask(p.mask, begin, end - begin, [&](int64_t at, const uint32_t* words, int64_t piece) {
    for (int64_t i = 0; i < piece; i += kLanes) {
      step(begin + at + i, min64(kLanes, piece - i), keep_factors(words + i, p.mask.threshold, kept));
    }
  });
}

void bottleneck(const BottleneckParams& p, int64_t begin, int64_t end) {
  with_activation(p.activation,
                  [&](auto activation) { bottleneck_run<decltype(activation)::kValue>(p, begin, end); });
}
