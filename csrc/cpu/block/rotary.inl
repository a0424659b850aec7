// Rotary position embedding: elements i of the two halves of a head are rotated by an angle, or back.

template <class T, bool kRounds>
inline Vec round_if(Vec x) {
  return kRounds ? rounded<T>(x) : x;
}
template <class T, bool kRounds>
inline Vec rounded_mul(Vec a, Vec b) {
  return round_if<T, kRounds>(mul(a, b));
}

// With kRounds each product, and their sum, is rounded to T.
template <class T, class Out, bool kRounds>
void rotary_run(const RotaryParams& p, int64_t begin, int64_t end) {
  const int64_t half = p.features / 2;
  for (int64_t token = begin; token < end; ++token) {
    const int64_t sequence = token / p.rows, row = token % p.rows;
    const T* tokens = static_cast<const T*>(p.x) + sequence * p.x_sequence + row * p.x_row;
    const float *cos = p.cos + sequence * p.angle_sequence + row * p.features,
                *sin = p.sin + sequence * p.angle_sequence + row * p.features;
    for (int64_t head = 0; head < p.heads; ++head) {
      const T* x = tokens + head * p.x_head;
      Out* out = static_cast<Out*>(p.out) + (token * p.heads + head) * p.features;
      for_lanes(0, half, [&](int64_t i, int64_t count) {
        const Vec a = load_lanes(x + i, count), b = load_lanes(x + half + i, count);
        const Vec sin_a = load_lanes(sin + i, count), sin_b = load_lanes(sin + half + i, count);
        const Vec turned_a = rounded_mul<T, kRounds>(a, load_lanes(cos + i, count)),
                  turned_b = rounded_mul<T, kRounds>(b, load_lanes(cos + half + i, count));
        if (p.inverse) {
          store_lanes(out + i, round_if<T, kRounds>(add(turned_a, rounded_mul<T, kRounds>(b, sin_b))), count);
          store_lanes(out + half + i, round_if<T, kRounds>(sub(turned_b, rounded_mul<T, kRounds>(a, sin_a))),
                      count);
        } else {
          store_lanes(out + i, round_if<T, kRounds>(sub(turned_a, rounded_mul<T, kRounds>(b, sin_a))), count);
          store_lanes(out + half + i, round_if<T, kRounds>(add(turned_b, rounded_mul<T, kRounds>(a, sin_b))),
                      count);
        }
      });
    }
  }
}

void rotary(const RotaryParams& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto type) {
    with_type(p.out_dtype, [&](auto out) {
      using T = decltype(type);
      using Out = decltype(out);
      p.rounds ? rotary_run<T, Out, true>(p, begin, end) : rotary_run<T, Out, false>(p, begin, end);
    });
  });
}
