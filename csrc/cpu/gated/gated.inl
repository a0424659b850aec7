// activation(gate) * up and its gradients.

// 1 / (1 + e^-x), and 1 minus that without cancellation. Where e^-x would overflow the value is 0: the
// clamped exponential would leave a tiny factor, which a huge x makes visible.
struct Sigmoid {
  Vec value, rest;
};
inline Sigmoid sigmoid(Vec x) {
  const Vec e = exponential(negate(x)), value = div(splat(1.0f), add(splat(1.0f), e));
  return {by_sign(add(x, splat(88.0f)), zero(), value), mul(e, value)};
}

struct ValueAndGradient {
  Vec value, gradient;
};

template <Activation kActivation>
inline ValueAndGradient activate(Vec x) {
  const Vec one = splat(1.0f);
  if constexpr (kActivation == Activation::kSilu) {
    const Sigmoid s = sigmoid(x);
    return {mul(x, s.value), mul(s.value, fma(x, s.rest, one))};
  } else if constexpr (kActivation == Activation::kGelu) {
    // The upper tail of the normal distribution at |x|: Abramowitz and Stegun 7.1.26, within 1e-7.
    const Vec magnitude = max(x, negate(x));
    const Vec t = div(one, fma(splat(0.3275911f * 0.70710678118f), magnitude, one));
    Vec q = fma(t, splat(1.061405429f), splat(-1.453152027f));
    q = fma(q, t, splat(1.421413741f));
    q = fma(q, t, splat(-0.284496736f));
    q = fma(q, t, splat(0.254829592f));
    const Vec density = exponential(mul(mul(x, x), splat(-0.5f)));  // times sqrt(2 pi)
    const Vec tail = mul(mul(mul(q, t), splat(0.5f)), density);
    const Vec cdf = by_sign(x, tail, sub(one, tail));
    return {mul(x, cdf), fma(mul(x, splat(0.3989422804f)), density, cdf)};
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    // (1 + tanh u) / 2 = sigmoid(2u) with 2u = x * (k2 + c2 x^2).
    constexpr float k2 = 2 * 0.7978845608f, c2 = k2 * 0.044715f;
    const Vec square = mul(x, x);
    const Sigmoid s = sigmoid(mul(x, fma(square, splat(c2), splat(k2))));
    const Vec inner = fma(square, splat(3 * c2), splat(k2));  // the derivative of 2u
    const Vec value = mul(x, s.value);
    return {value, fma(mul(value, s.rest), inner, s.value)};
  } else {
    return {max(zero(), x), by_sign(sub(zero(), x), one, zero())};  // 0 - 0 is +0
  }
}

template <Activation kActivation, class T>
void gated_run(const GatedParams& p, int64_t begin, int64_t end) {
  const T *gate = static_cast<const T*>(p.gate), *up = static_cast<const T*>(p.up);
  T* out = static_cast<T*>(p.out);
  for_lanes(begin, end, [&](int64_t i, int64_t count) {
    const Vec value = activate<kActivation>(load_lanes(gate + i, count)).value;
    store_lanes(out + i, mul(value, load_lanes(up + i, count)), count);
  });
}

template <Activation kActivation, class T>
void gated_backward_run(const GatedParams& p, int64_t begin, int64_t end) {
  const T *gate = static_cast<const T*>(p.gate), *up = static_cast<const T*>(p.up),
          *dy = static_cast<const T*>(p.dy);
  T *d_gate = static_cast<T*>(p.d_gate), *d_up = static_cast<T*>(p.d_up);
  for_lanes(begin, end, [&](int64_t i, int64_t count) {
    const ValueAndGradient a = activate<kActivation>(load_lanes(gate + i, count));
    const Vec d = load_lanes(dy + i, count);
    store_lanes(d_gate + i, mul(mul(d, load_lanes(up + i, count)), a.gradient), count);
    store_lanes(d_up + i, mul(d, a.value), count);
  });
}

template <Activation kActivation>
struct ActivationTag {
  static constexpr Activation kValue = kActivation;
};

// Calls run with the activation as a constant.
template <class Run>
void with_activation(Activation activation, const Run& run) {
  switch (activation) {
    case Activation::kSilu:
      return run(ActivationTag<Activation::kSilu>{});
    case Activation::kGelu:
      return run(ActivationTag<Activation::kGelu>{});
    case Activation::kGeluTanh:
      return run(ActivationTag<Activation::kGeluTanh>{});
    case Activation::kRelu:
      return run(ActivationTag<Activation::kRelu>{});
  }
}

void gated(const GatedParams& p, int64_t begin, int64_t end) {
  with_activation(p.activation, [&](auto activation) {
    with_type(p.dtype,
              [&](auto type) { gated_run<decltype(activation)::kValue, decltype(type)>(p, begin, end); });
  });
}

void gated_backward(const GatedParams& p, int64_t begin, int64_t end) {
  with_activation(p.activation, [&](auto activation) {
    with_type(p.dtype, [&](auto type) {
      gated_backward_run<decltype(activation)::kValue, decltype(type)>(p, begin, end);
    });
  });
}
