// The softmax of a head's logits, tile by tile along the vocabulary, and the gradients of the loss.

// A row of a tile as floats that may be overwritten: the logits themselves, or a copy.
template <class T>
inline float* softmax_row(const T* logits, int64_t cols, float* copy) {
  widen_run(logits, cols, 1.0f, copy);
  return copy;
}
inline float* softmax_row(float* logits, int64_t, float*) { return logits; }

// The error is at most 0.64 epsilon. Near 0 a polynomial, since 1 - 2 / (1 + e^2u) cancels there.
inline Vec hyperbolic_tangent(Vec u) {
  constexpr float kEdge = 0.625f;
  const Vec one = splat(1.0f), square = mul(u, u), magnitude = max(u, negate(u));
  Vec near = fma(square, splat(-0.00571703251f), splat(0.0206505755f));
  near = fma(near, square, splat(-0.0537434943f));
  near = fma(near, square, splat(0.133314912f));
  near = fma(near, square, splat(-0.333332839f));
  near = fma(mul(u, square), near, u);
  const Vec far = sub(one, div(splat(2.0f), add(one, exponential(add(magnitude, magnitude)))));
  return by_sign(sub(magnitude, splat(kEdge)), near, by_sign(u, negate(far), far));
}

// cap * tanh(z / cap).
inline Vec capped(Vec z, float cap) { return mul(splat(cap), hyperbolic_tangent(mul(z, splat(1.0f / cap)))); }

// Applies bias, scale and cap in place.
template <class Params>
void shape_logits(const Params& p, float* row) {
  for_lanes(0, p.cols, [&](int64_t i, int64_t n) {
    Vec z = load_lanes(row + i, n);
    if (p.bias) z = add(z, load_lanes(p.bias + i, n));
    z = mul(z, splat(p.scale));
    store_lanes(row + i, p.cap > 0.0f ? capped(z, p.cap) : z, n);
  });
}

template <bool kCapped, class T>
void exponentials(const SoftmaxParams& p, const float* row, float maximum, SoftmaxState& s, T* out) {
  const Vec shift = splat(maximum), inverse = splat(kCapped ? 1.0f / p.cap : 0.0f);
  Vec sums[2] = {zero(), zero()}, weighted = zero(), squares = zero();
  for_lanes(0, p.cols, [&](int64_t i, int64_t n) {
    const Vec z = load_padded(row + i, n, maximum - kNegligible), e = exponential(sub(z, shift));
    Vec& sum = sums[i / kLanes % 2];
    sum = add(sum, e);
    if (p.need_weighted) weighted = fma(e, z, weighted);
    if (p.need_squares) squares = fma(e, e, squares);
    if (!out) return;
    const Vec t = mul(z, inverse);
    store_lanes(out + i, kCapped ? mul(e, fma(negate(t), t, splat(1.0f))) : e, n);
  });
  s.sum += sum_lanes(add(sums[0], sums[1]));
  if (p.need_weighted) s.weighted += sum_lanes(weighted);
  if (p.need_squares) s.squares += sum_lanes(squares);
}

template <class In, class Out>
void softmax_tile_run(const SoftmaxParams& p, int64_t begin, int64_t end) {
  const bool shaped = p.bias || p.scale != 1.0f || p.cap > 0.0f;
  float copy[kSoftmaxCols];
  for (int64_t m = begin; m < end; ++m) {
    SoftmaxState& s = p.states[m];
    float* row = softmax_row(static_cast<In*>(p.logits) + m * p.logits_ld, p.cols, copy);
    Out* out = p.out ? static_cast<Out*>(p.out) + m * p.out_ld : nullptr;
    if (shaped) shape_logits(p, row);
    if (p.need_total) s.total += sum_row(row, nullptr, p.cols);
    const int64_t label = p.labels[m] - p.first_col;
    const bool here = 0 <= label && label < p.cols;
    if (here) {
      s.label = row[label];
      row[label] = -FLT_MAX;
    }
    const float maximum = row_max(row, p.cols, s.max);
    if (here) row[label] = maximum - kNegligible;
    const float factor = maximum == s.max ? 1.0f : exponential(s.max - maximum);
    const bool rescales = factor != 1.0f && s.sum > 0.0f;
    s.max = maximum;
    s.sum *= factor;
    s.weighted *= factor;
    s.squares *= factor * factor;
    if (rescales && p.sums) {
      float* sums = p.sums + m * p.features;
      for_lanes(0, p.features, [&](int64_t i, int64_t n) {
        store_lanes(sums + i, mul(load_lanes(sums + i, n), splat(factor)), n);
      });
    }
    p.cap > 0.0f ? exponentials<true>(p, row, maximum, s, out) : exponentials<false>(p, row, maximum, s, out);
    if (here && out) store_part(out + label, zero(), 1);
  }
}

void softmax_tile(const SoftmaxParams& p, int64_t begin, int64_t end) {
  with_type(p.out_dtype, [&](auto type) {
    using T = decltype(type);
    p.logits_dtype == DType::kF32 ? softmax_tile_run<float, T>(p, begin, end)
                                  : softmax_tile_run<T, T>(p, begin, end);
  });
}

void softmax_dx(const SoftmaxDxParams& p) {
  float row[kSoftmaxDxRun];
  for (int64_t first = 0; first < p.features; first += kSoftmaxDxRun) {
    const int64_t count = min64(kSoftmaxDxRun, p.features - first);
    fill_panel_row(p.weight, p.label * p.weight.ld + first, count, p.label_factor, row);
    if (p.weight.nf4) widen_run(row, count, p.label_factor, row);
    for_lanes(0, count, [&](int64_t i, int64_t n) {
      Vec sum = load_lanes(row + i, n);
      if (p.mean) sum = fma(splat(p.mean_factor), load_lanes(p.mean + first + i, n), sum);
      for (int64_t part = 0; part < p.parts; ++part) {
        sum = fma(splat(p.factors[part]), load_lanes(p.sums + part * p.part_ld + first + i, n), sum);
      }
      store_lanes(row + i, sum, n);
    });
    with_type(p.dtype,
              [&](auto type) { narrow_run(row, count, static_cast<decltype(type)*>(p.out) + first); });
  }
}

template <class T>
void logit_gradients_run(const LogitGradientParams& p, int64_t begin, int64_t end) {
  const bool shaped = p.bias || p.scale != 1.0f || p.cap > 0.0f;
  const float even = p.smoothing / static_cast<float>(p.vocabulary);
  const Vec inverse = splat(p.cap > 0.0f ? 1.0f / p.cap : 0.0f), one = splat(1.0f);
  for (int64_t m = begin; m < end; ++m) {
    float* row = p.logits + m * p.cols;
    if (shaped) shape_logits(p, row);
    const Vec of_p = splat(p.of_p[m]), of_pz = splat(p.of_pz ? p.of_pz[m] : 0.0f), scale = splat(p.scale);
    const float of_label = p.of_label[m];
    const auto gradient = [&](Vec logit, Vec term) {
      const Vec z = max(logit, splat(-kMasked)), weight = fma(of_pz, z, of_p);
      const Vec d = fma(weight, exponential(sub(z, splat(p.lse[m]))), term), t = mul(z, inverse);
      return mul(mul(d, fma(negate(t), t, one)), scale);
    };
    const int64_t label = p.labels[m] - p.first_col;
    const bool here = 0 <= label && label < p.cols;
    const Vec of_others = splat(-even * of_label), of_own = splat((p.smoothing - 1.0f - even) * of_label);
    const Vec label_gradient = here ? gradient(splat(row[label]), of_own) : zero();
    for_lanes(0, p.cols, [&](int64_t i, int64_t n) {
      store_lanes(row + i, gradient(load_lanes(row + i, n), of_others), n);
    });
    if (here) store_part(row + label, label_gradient, 1);
    if (p.rounded) narrow_run(row, p.cols, static_cast<T*>(p.rounded) + m * p.cols);
  }
}

void logit_gradients(const LogitGradientParams& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto type) { logit_gradients_run<decltype(type)>(p, begin, end); });
}
