// RMS norm of rows, x / sqrt(mean(x^2) + eps) * weight, and its gradients.

// Sums over a row: term(i, count, sum) returns sum plus the contribution of elements [i, i + count).
template <class Term>
inline float sum_terms(int64_t features, const Term& term) {
  constexpr int kChains = 4;
  Vec sums[kChains] = {zero(), zero(), zero(), zero()};
  int64_t i = 0;
  for (; i + kChains * kLanes <= features; i += kChains * kLanes) {
    for (int c = 0; c < kChains; ++c) sums[c] = term(i + c * kLanes, kLanes, sums[c]);
  }
  for (; i < features; i += kLanes) sums[0] = term(i, min64(kLanes, features - i), sums[0]);
  return sum_lanes(add(add(sums[0], sums[1]), add(sums[2], sums[3])));
}

// Normalised values as they are multiplied with the weight.
template <class T>
inline Vec normed_lanes(const RmsNormParams& p, const T* x, int64_t count, Vec rstd) {
  const Vec normed = mul(load_lanes(x, count), rstd);
  return p.rounds ? rounded<T>(normed) : normed;
}

template <class T, class Out>
void rms_norm_run(const RmsNormParams& p, int64_t begin, int64_t end) {
  for (int64_t m = begin; m < end; ++m) {
    const T* x = static_cast<const T*>(p.x) + m * p.features;
    Out* out = static_cast<Out*>(p.out) + m * p.features;
    const float squares = sum_terms(p.features, [&](int64_t i, int64_t count, Vec sum) {
      const Vec one = load_lanes(x + i, count);
      return fma(one, one, sum);
    });
    float root[kLanes];
    store(root, square_root(splat(squares / p.features + p.eps)));
    const Vec rstd = splat(p.rstd[m] = 1.0f / root[0]);
    for_lanes(0, p.features, [&](int64_t i, int64_t count) {
      store_lanes(out + i, mul(load_lanes(p.weight + i, count), normed_lanes(p, x + i, count, rstd)), count);
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
        const Vec normed = normed_lanes(p, x + i, count, rstd);
        store_lanes(p.sums + i, fma(load_lanes(dy + i, count), normed, load_lanes(p.sums + i, count)), count);
      });
    }
    if (!p.dx) continue;
    const float dot = sum_terms(p.features, [&](int64_t i, int64_t count, Vec sum) {
      const Vec d = mul(load_lanes(dy + i, count), load_lanes(p.weight + i, count));
      return fma(d, mul(load_lanes(x + i, count), rstd), sum);
    });
    const Vec mean = splat(dot / p.features);
    T* dx = static_cast<T*>(p.dx) + m * p.features;
    const T* add_to = p.add ? static_cast<const T*>(p.add) + m * p.features : nullptr;
    for_lanes(0, p.features, [&](int64_t i, int64_t count) {
      const Vec d = mul(load_lanes(dy + i, count), load_lanes(p.weight + i, count));
      const Vec normed = mul(load_lanes(x + i, count), rstd);
      const Vec start = add_to ? load_lanes(add_to + i, count) : zero();
      store_lanes(dx + i, fma(rstd, sub(d, mul(normed, mean)), start), count);
    });
  }
}

// Calls run with the dtypes of x and of the output.
template <class Run>
void with_norm_types(const RmsNormParams& p, const Run& run) {
  if (p.dtype == DType::kF32) return with_type(p.out_dtype, [&](auto out) { run(float{}, out); });
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

template <class Branch, class T>
void add_row(const RmsNormParams& p, int64_t m) {
  const Branch* branch = static_cast<const Branch*>(p.branch) + m * p.features;
  const T* residual = static_cast<const T*>(p.residual) + m * p.features;
  T* sum = static_cast<T*>(p.sum) + m * p.features;
  for_lanes(0, p.features, [&](int64_t i, int64_t count) {
    store_lanes(sum + i, add(load_lanes(residual + i, count), load_lanes(branch + i, count)), count);
  });
}

// Row by row, so that the sum is still in L1 when it is normalised.
void add_rms_norm(const RmsNormParams& p, int64_t begin, int64_t end) {
  with_type(p.branch_dtype, [&](auto type) {
    using Branch = decltype(type);
    for (int64_t m = begin; m < end; ++m) {
      p.dtype == p.branch_dtype ? add_row<Branch, Branch>(p, m) : add_row<Branch, float>(p, m);
      rms_norm(p, m, m + 1);
    }
  });
}
