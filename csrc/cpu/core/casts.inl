// Elementwise casts, and sums of two dtypes.

template <class T, class Out>
void cast_run(const T* x, Out* out, int64_t begin, int64_t end) {
  for_lanes(begin, end,
            [&](int64_t i, int64_t count) { store_lanes(out + i, load_lanes(x + i, count), count); });
}

template <class T, class Residual, class Out>
void add_run(const T* x, const Residual* residual, Out* out, int64_t begin, int64_t end) {
  for_lanes(begin, end, [&](int64_t i, int64_t count) {
    store_lanes(out + i, add(load_lanes(residual + i, count), load_lanes(x + i, count)), count);
  });
}

void cast(const CastParams& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto type) {
    using T = decltype(type);
    const T* x = static_cast<const T*>(p.x);
    with_type(p.out_dtype, [&](auto out_type) {
      using Out = decltype(out_type);
      Out* out = static_cast<Out*>(p.out);
      if (!p.residual) return cast_run(x, out, begin, end);
      with_type(p.residual_dtype, [&](auto residual_type) {
        add_run(x, static_cast<const decltype(residual_type)*>(p.residual), out, begin, end);
      });
    });
  });
}
