// Dropout: which elements are kept, as a function of seed and position (params.h, reference/dropout.py).

constexpr int64_t kMaskBlocks = 16;  // of the generator, computed together
constexpr int64_t kMaskRun = 4 * kMaskBlocks;

// words[4 * b + w] = word w of block first_block + b.
inline void philox(const DropoutMask& mask, uint64_t first_block, uint32_t* words) {
  uint32_t c0[kMaskBlocks], c1[kMaskBlocks], c2[kMaskBlocks], c3[kMaskBlocks];
  for (int i = 0; i < kMaskBlocks; ++i) {
    const uint64_t block = first_block + i;
    c0[i] = static_cast<uint32_t>(block);
    c1[i] = static_cast<uint32_t>(block >> 32);
    c2[i] = mask.stream;
    c3[i] = 0;
  }
  uint32_t k0 = static_cast<uint32_t>(mask.seed), k1 = static_cast<uint32_t>(mask.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < kMaskBlocks; ++i) {
      const uint64_t p0 = uint64_t{0xd2511f53} * c0[i], p1 = uint64_t{0xcd9e8d57} * c2[i];
      c0[i] = static_cast<uint32_t>(p1 >> 32) ^ c1[i] ^ k0;
      c1[i] = static_cast<uint32_t>(p1);
      c2[i] = static_cast<uint32_t>(p0 >> 32) ^ c3[i] ^ k1;
      c3[i] = static_cast<uint32_t>(p0);
    }
    k0 += 0x9e3779b9;
    k1 += 0xbb67ae85;
  }
  for (int i = 0; i < kMaskBlocks; ++i) {
    words[4 * i] = c0[i];
    words[4 * i + 1] = c1[i];
    words[4 * i + 2] = c2[i];
    words[4 * i + 3] = c3[i];
  }
}

// Calls use(index, keep, count) for pieces of the run of elements from `first`: index is from the run's
// start, keep[i] is mask.scale or 0.
template <class Use>
void for_mask(const DropoutMask& mask, int64_t first, int64_t count, const Use& use) {
  for (int64_t done = 0; done < count;) {
    const int64_t element = first + done, skip = element % 4;
    uint32_t words[kMaskRun];
    philox(mask, static_cast<uint64_t>(element / 4), words);
    float keep[kMaskRun];
    for (int i = 0; i < kMaskRun; ++i) keep[i] = words[i] >= mask.threshold ? mask.scale : 0.0f;
    const int64_t piece = min64(kMaskRun - skip, count - done);
    use(done, keep + skip, piece);
    done += piece;
  }
}

template <class T>
void dropout_run(const DropoutParams& p, int64_t begin, int64_t end) {
  const T* x = static_cast<const T*>(p.x) + begin;
  T* out = static_cast<T*>(p.out) + begin;
  for_mask(p.mask, begin, end - begin, [&](int64_t at, const float* keep, int64_t count) {
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) store(out + at + i, mul(load(x + at + i), load(keep + i)));
    if (i < count) {
      const Vec kept = mul(load_part(x + at + i, count - i), load_part(keep + i, count - i));
      store_part(out + at + i, kept, count - i);
    }
  });
}

void dropout(const DropoutParams& p, int64_t begin, int64_t end) {
  switch (p.dtype) {
    case DType::kF32:
      return dropout_run<float>(p, begin, end);
    case DType::kBF16:
      return dropout_run<BF16>(p, begin, end);
    case DType::kF16:
      return dropout_run<F16>(p, begin, end);
  }
}

// sums[i] += x[i] * scale where element first + i is kept.
inline void add_kept(const DropoutMask& mask, int64_t first, int64_t count, const float* x, float* sums) {
  for_mask(mask, first, count, [&](int64_t at, const float* keep, int64_t piece) {
    for (int64_t i = 0; i < piece; ++i) sums[at + i] += x[at + i] * keep[i];
  });
}
