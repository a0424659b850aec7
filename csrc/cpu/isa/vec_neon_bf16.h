// Pairs of bf16 in 32-bit lanes (bfdot), in addition to NEON's vectors.

// A bf16 in a panel, never in a result: a NaN may have another payload.
struct PanelBF16 {
  uint16_t bits;
};
inline uint16x4_t narrow(Vec x, PanelBF16) { return vreinterpret_u16_bf16(vcvt_bf16_f32(x)); }

using VecPairs = bfloat16x8_t;

// By bytes, which may alias any type.
inline VecPairs load_pairs(const void* p) {
  return vreinterpretq_bf16_u8(vld1q_u8(static_cast<const uint8_t*>(p)));
}
inline VecPairs load_pairs_part(const void* p, int64_t count) {
  PanelBF16 elements[2 * kLanes] = {};
  memcpy(elements, p, count * sizeof(PanelBF16));
  return load_pairs(elements);
}
inline Vec as_floats(VecPairs x) { return vreinterpretq_f32_bf16(x); }
inline void store_bits(uint32_t* p, Vec x) { vst1q_u32(p, vreinterpretq_u32_f32(x)); }
// sum[i] + a[2i] * b[2i] + a[2i + 1] * b[2i + 1]
inline Vec dot_pairs(VecPairs a, VecPairs b, Vec sum) { return vbfdotq_f32(sum, a, b); }
// bfdot can broadcast a pair from one lane.
struct SplatPair {
  bfloat16x4_t pair;
};
inline SplatPair splat_pair(const void* p) {
  uint32_t pair;
  memcpy(&pair, p, sizeof(pair));
  return {vreinterpret_bf16_u32(vset_lane_u32(pair, vdup_n_u32(0), 0))};
}
inline Vec dot_pairs(SplatPair a, VecPairs b, Vec sum) { return vbfdotq_lane_f32(sum, b, a.pair, 0); }

// a and b rounded, as a pair in each lane.
template <class Half>
inline Vec pair_lanes(Vec a, Vec b, Half type) {
  const uint16x4_t x = narrow(a, type), y = narrow(b, type);
  return vreinterpretq_f32_u16(vcombine_u16(vzip1_u16(x, y), vzip2_u16(x, y)));
}

inline void store_pairs(void* p, VecPairs x) { vst1q_u8(static_cast<uint8_t*>(p), vreinterpretq_u8_bf16(x)); }

// a0 b0 a1 b1 ... of 8 elements each.
inline void interleave_pairs(VecPairs a, VecPairs b, PanelBF16* out) {
  const uint16x8_t x = vreinterpretq_u16_bf16(a), y = vreinterpretq_u16_bf16(b);
  store_pairs(out, vreinterpretq_bf16_u16(vzip1q_u16(x, y)));
  store_pairs(out + 2 * kLanes, vreinterpretq_bf16_u16(vzip2q_u16(x, y)));
}

// The even and the odd of 16 elements.
struct EvenOdd {
  VecPairs even, odd;
};
inline EvenOdd even_odd(VecPairs first, VecPairs second) {
  const uint16x8_t x = vreinterpretq_u16_bf16(first), y = vreinterpretq_u16_bf16(second);
  return {vreinterpretq_bf16_u16(vuzp1q_u16(x, y)), vreinterpretq_bf16_u16(vuzp2q_u16(x, y))};
}

// Decodes 64 elements with one scale, of every 16 the even before the odd: they are the high and the low
// nibbles, so nothing has to be interleaved.
struct EvenOddTable {
  HalfPlanes planes;
  EvenOddTable(const CodeValues& codes, float scale) : planes(codes, scale, PanelBF16{}) {}
  void decode(const uint8_t* packed, PanelBF16* out) const {
    for (int i = 0; i < 64; i += 16) {
      const uint8x8_t bytes = vld1_u8(packed + i / 2);
      HalfValues(planes, high_then_low(vcombine_u8(bytes, bytes))).store(out + i);
    }
  }
};

// Decodes two rows with a scale each, interleaved.
struct PairTable {
  static constexpr int kStep = 16;  // columns
  HalfPlanes planes0, planes1;
  PairTable(const CodeValues& codes, float scale0, float scale1) : PairTable(codes, scale0, codes, scale1) {}
  PairTable(const CodeValues& codes0, float scale0, const CodeValues& codes1, float scale1)
      : planes0(codes0, scale0, PanelBF16{}), planes1(codes1, scale1, PanelBF16{}) {}
  void decode(const uint8_t* packed0, const uint8_t* packed1, PanelBF16* out) const {
    const HalfValues row0(planes0, nibbles_in_order(packed0)), row1(planes1, nibbles_in_order(packed1));
    interleave_pairs(vreinterpretq_bf16_u8(row0.first), vreinterpretq_bf16_u8(row1.first), out);
    interleave_pairs(vreinterpretq_bf16_u8(row0.second), vreinterpretq_bf16_u8(row1.second),
                     out + 4 * kLanes);
  }
};

// The codes as bf16 for 16-bit lanes, times bf16_factor.
struct PairCodeTable {
  uint8x16x2_t planes;  // their low bytes, and their high ones
  explicit PairCodeTable(const CodeValues& codes) {
    const HalfPlanes halves(codes, codes.bf16_factor, PanelBF16{});
    planes.val[0] = halves.low;
    planes.val[1] = halves.high;
  }
};
inline VecI next_nibble16(VecI bits) {
  return vreinterpretq_s32_u16(vshrq_n_u16(vreinterpretq_u16_s32(bits), 4));
}
inline VecPairs lookup_code(const PairCodeTable& table, VecI bits) {
  const uint16x8_t nibble = vandq_u16(vreinterpretq_u16_s32(bits), vdupq_n_u16(15));
  const uint16x8_t index = vmlaq_u16(vdupq_n_u16(0x1000), nibble, vdupq_n_u16(0x0101));
  return vreinterpretq_bf16_u8(vqtbl2q_u8(table.planes, vreinterpretq_u8_u16(index)));
}
