// Random words for dropout and stochastic rounding: Philox4x32-10 as a function of seed and position
// (ops/lora/dropout.py).

constexpr int kMaskChains = 4;  // vectors in flight, as rounds depend on each other
constexpr int64_t kMaskBlocks = kMaskChains * kLanes / 2;  // blocks of the generator made together
constexpr int64_t kMaskRun = 4 * kMaskBlocks;

// words[4 * b + w] = word w of block first_block + b.
inline void philox(const DropoutMask& mask, uint64_t first_block, uint32_t* words) {
  VecW c0[kMaskChains], c1[kMaskChains], c2[kMaskChains], c3[kMaskChains];
#pragma GCC unroll 4
  for (int i = 0; i < kMaskChains; ++i) {
    c0[i] = count_from(first_block + i * (kLanes / 2));
    c1[i] = high_half(c0[i]);
    c2[i] = splat_word(mask.stream);
    c3[i] = splat_word(mask.last);
  }
  const VecW m0 = splat_word(0xd2511f53), m1 = splat_word(0xcd9e8d57);
  uint32_t k0 = static_cast<uint32_t>(mask.seed), k1 = static_cast<uint32_t>(mask.seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const VecW key0 = splat_word(k0), key1 = splat_word(k1);
#pragma GCC unroll 4
    for (int i = 0; i < kMaskChains; ++i) {
      const VecW p0 = multiply_low(c0[i], m0), p1 = multiply_low(c2[i], m1);
      c0[i] = xor3(high_half(p1), c1[i], key0);
      c1[i] = p1;
      c2[i] = xor3(high_half(p0), c3[i], key1);
      c3[i] = p0;
    }
    k0 += 0x9e3779b9;
    k1 += 0xbb67ae85;
  }
#pragma GCC unroll 4
  for (int i = 0; i < kMaskChains; ++i) store_blocks(words + 2 * kLanes * i, c0[i], c1[i], c2[i], c3[i]);
}

// Calls use(index, words, count) for pieces of a run of `count` elements from `first`: index is relative to
// the run's start, words[i] decides on element index + i. kLanes words may be read from each of them.
template <class Use>
void for_mask(const DropoutMask& mask, int64_t first, int64_t count, const Use& use) {
  uint32_t words[kMaskRun + kLanes] = {};
  for (int64_t done = 0; done < count;) {
    const int64_t element = first + done, skip = element % 4;
    philox(mask, static_cast<uint64_t>(element / 4), words);
    const int64_t piece = min64(kMaskRun - skip, count - done);
    use(done, words + skip, piece);
    done += piece;
  }
}

// sums[i] += x[i] * scale where element first + i is kept.
inline void add_kept(const DropoutMask& mask, int64_t first, int64_t count, const float* x, float* sums) {
  for_mask(mask, first, count, [&](int64_t at, const uint32_t* words, int64_t piece) {
    for (int64_t i = 0; i < piece; i += kLanes) {
      const Vec keep = keep_factors(words + i, mask.threshold, mask.scale);
      const int64_t lanes = min64(kLanes, piece - i);
      store_lanes(sums + at + i, fma(load_lanes(x + at + i, lanes), keep, load_lanes(sums + at + i, lanes)),
                  lanes);
    }
  });
}
