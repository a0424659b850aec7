// Dropout of activations, by the words of core/philox.inl.

template <class T>
void dropout_run(const DropoutParams& p, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(p.x) + begin;
  T* out = static_cast<T*>(p.out) + begin;
  for_mask(p.mask, begin, end - begin, [&](int64_t at, const uint32_t* words, int64_t count) {
    for (int64_t i = 0; i < count; i += kLanes) {
      const Vec keep = keep_factors(words + i, p.mask.threshold, p.mask.scale);
      const int64_t lanes = min64(kLanes, count - i);
      store_lanes(out + at + i, mul(load_lanes(x + at + i, lanes), keep), lanes);
    }
  });
}

void dropout(const DropoutParams& p, int64_t begin, int64_t end) {
  with_type(p.dtype, [&](auto type) { dropout_run<decltype(type)>(p, begin, end); });
}
