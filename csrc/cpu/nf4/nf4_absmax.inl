// Double quantisation of the absmax: 8-bit codes of the signed dynamic map, scaled by the absmax of a group.

// Groups [group_begin, group_end) of kAbsmaxBlock values.
void quantize_absmax(const AbsmaxParams& p, int64_t group_begin, int64_t group_end) {
  static_assert(nf4::kAbsmaxBlock == kStateBlock, "");
  const CodeFinder<true> finder(kSignedCodes);
  for (int64_t group = group_begin; group < group_end; ++group) {
    const int64_t first = group * kStateBlock, count = min64(kStateBlock, p.blocks - first);
    float centered[kStateBlock] = {};
    for (int64_t i = 0; i < count; ++i) centered[i] = p.absmax[first + i] - p.offset;
    const float maximum = absmax_of(centered), inverse = inverse_of(maximum);
    p.absmax2[group] = maximum;
    uint8_t codes[kStateBlock];
    for (int64_t i = 0; i < kStateBlock; i += kCodeRun) finder.write(centered + i, splat(inverse), codes + i);
    for (int64_t i = 0; i < count; ++i) {
      const float x = centered[i] * inverse;
      p.q8[first + i] = x == x ? codes[i] : 0;
    }
  }
}
