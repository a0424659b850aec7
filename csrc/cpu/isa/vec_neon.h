// NEON vectors of every 64-bit Arm processor: 4 fp32 lanes. Same interface as vec_avx512.h, which documents
// it. Lookups are by bytes (tbl), the only permutation NEON has.

using Vec = float32x4_t;
using VecI = int32x4_t;
constexpr int kLanes = 4;
constexpr int kRegisters = 32;
// Below this many multiply-adds, waking a second thread costs more than it saves. Not measured: scaled from
// avx2's by the number of lanes.
constexpr int64_t kMultiplyAddsPerThread = PEFT_KERNELS_BF16_DOT ? 500'000 : 250'000;
// Register tiles, sized for 32 registers.
constexpr int kDotRows = 6;
constexpr int kOuterRows = 6;
constexpr int kOuterVecs = 4;

inline Vec zero() { return vdupq_n_f32(0.0f); }
inline Vec splat(float x) { return vdupq_n_f32(x); }
inline Vec add(Vec a, Vec b) { return vaddq_f32(a, b); }
inline Vec mul(Vec a, Vec b) { return vmulq_f32(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return vfmaq_f32(c, a, b); }
inline Vec sub(Vec a, Vec b) { return vsubq_f32(a, b); }
inline Vec div(Vec a, Vec b) { return vdivq_f32(a, b); }
inline Vec min(Vec a, Vec x) { return vminq_f32(a, x); }
inline Vec max(Vec a, Vec x) { return vmaxq_f32(a, x); }
inline Vec by_sign(Vec x, Vec negative, Vec positive) {
  return vbslq_f32(vcltzq_s32(vreinterpretq_s32_f32(x)), negative, positive);
}
inline Vec where_zero(Vec x, Vec value, Vec other) { return vbslq_f32(vceqzq_f32(x), value, other); }
inline Vec low_bits_to_exponent(Vec x) {
  return vreinterpretq_f32_s32(vshlq_n_s32(vreinterpretq_s32_f32(x), 23));
}

inline Vec widen(uint16x4_t bits, BF16) { return vreinterpretq_f32_u32(vshll_n_u16(bits, 16)); }
inline Vec widen(uint16x4_t bits, F16) { return vcvt_f32_f16(vreinterpret_f16_u16(bits)); }
inline float float_of_half(uint16_t bits) {
  return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(bits))), 0);
}

inline Vec load(const float* p) { return vld1q_f32(p); }
template <class Half>
inline Vec load(const Half* p) {
  return widen(vld1_u16(&p->bits), Half{});
}

template <class T>
inline Vec load_part(const T* p, int64_t count) {
  T lanes[kLanes] = {};
  memcpy(lanes, p, count * sizeof(T));
  return load(lanes);
}

inline uint16x4_t narrow(Vec x, BF16) {
  const uint16x4_t is_number = vmovn_u32(vceqq_f32(x, x));
#if PEFT_KERNELS_BF16_DOT
  const uint16x4_t rounded = vreinterpret_u16_bf16(vcvt_bf16_f32(x));
#else
  const uint32x4_t bits = vreinterpretq_u32_f32(x), odd = vshrq_n_u32(vshlq_n_u32(bits, 15), 31);
  const uint16x4_t rounded = vaddhn_u32(vaddq_u32(bits, odd), vdupq_n_u32(0x7fff));
#endif
  return vbsl_u16(is_number, rounded, vdup_n_u16(0x7fc0));
}
inline uint16x4_t narrow(Vec x, F16) { return vreinterpret_u16_f16(vcvt_f16_f32(x)); }

inline void store(float* p, Vec x) { vst1q_f32(p, x); }
template <class Half>
inline void store(Half* p, Vec x) {
  vst1_u16(&p->bits, narrow(x, Half{}));
}

template <class T>
inline void store_part(T* p, Vec x, int64_t count) {
  T lanes[kLanes];
  store(lanes, x);
  memcpy(p, lanes, count * sizeof(T));
}

using VecW = uint64x2_t;
inline VecW count_from(uint64_t first) { return VecW{first, first + 1}; }
inline VecW splat_word(uint32_t x) { return vdupq_n_u64(x); }
inline VecW multiply_low(VecW a, VecW b) { return vmull_u32(vmovn_u64(a), vmovn_u64(b)); }
inline VecW high_half(VecW a) { return vshrq_n_u64(a, 32); }
inline VecW xor3(VecW a, VecW b, VecW c) { return veorq_u64(veorq_u64(a, b), c); }
inline void store_blocks(uint32_t* out, VecW w0, VecW w1, VecW w2, VecW w3) {
  const uint64x2_t w01 = vsliq_n_u64(w0, w1, 32), w23 = vsliq_n_u64(w2, w3, 32);
  vst1q_u32(out, vreinterpretq_u32_u64(vzip1q_u64(w01, w23)));
  vst1q_u32(out + kLanes, vreinterpretq_u32_u64(vzip2q_u64(w01, w23)));
}
inline Vec keep_factors(const uint32_t* words, uint32_t threshold, float scale) {
  const uint32x4_t kept = vcgeq_u32(vld1q_u32(words), vdupq_n_u32(threshold));
  return vreinterpretq_f32_u32(vandq_u32(kept, vreinterpretq_u32_f32(splat(scale))));
}

inline void add_lane_sums(Vec a, Vec b, Vec c, Vec d, float* out) {
  const Vec sums = vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d));
  vst1q_f32(out, vaddq_f32(vld1q_f32(out), sums));
}

inline VecI zero_bits() { return vdupq_n_s32(0); }
inline VecI max_bits(VecI a, Vec x) { return vmaxq_s32(a, vreinterpretq_s32_f32(x)); }
inline VecI max_abs_bits(VecI a, Vec x) { return max_bits(a, vabsq_f32(x)); }
inline int32_t reduce_max(VecI a) { return vmaxvq_s32(a); }
inline VecI double_plus_greater(VecI index, Vec a, Vec b) {
  return vsubq_s32(vaddq_s32(index, index), vreinterpretq_s32_u32(vcgtq_f32(a, b)));  // -1 where true
}

// Byte indices of words in a table of words.
inline uint8x16_t bytes_of_words(uint32x4_t index) {
  return vreinterpretq_u8_u32(vmlaq_u32(vdupq_n_u32(0x03020100), index, vdupq_n_u32(0x04040404)));
}
// Uses the lowest four bits of each index.
inline Vec lookup16(uint8x16x4_t table, uint32x4_t index) {
  return vreinterpretq_f32_u8(vqtbl4q_u8(table, bytes_of_words(vandq_u32(index, vdupq_n_u32(15)))));
}
inline uint8x16x4_t load16(const float* table) {
  return vld1q_u8_x4(reinterpret_cast<const uint8_t*>(table));
}
inline Vec lookup8(const float* table, VecI index) {
  const uint8x16x2_t words = vld1q_u8_x2(reinterpret_cast<const uint8_t*>(table));
  return vreinterpretq_f32_u8(vqtbl2q_u8(words, bytes_of_words(vreinterpretq_u32_s32(index))));
}
inline void store_nibbles(uint8_t* p, VecI codes) {
  const uint32x2_t pairs = vreinterpret_u32_u16(vmovn_u32(vreinterpretq_u32_s32(codes)));
  const uint8x8_t bytes = vreinterpret_u8_u32(vsra_n_u32(vshl_n_u32(pairs, 4), pairs, 16));
  vst1_lane_u8(p, bytes, 0);
  vst1_lane_u8(p + 1, bytes, 4);
}

struct CodeTable {
  uint8x16x4_t codes;
  explicit CodeTable(const CodeValues& from) : codes(load16(from.value)) {}
};
inline VecI load_bytes(const uint8_t* p) { return vreinterpretq_s32_u8(vld1q_u8(p)); }
inline VecI next_nibble(VecI bits) {
  return vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(bits), 4));
}
inline Vec lookup_code(const CodeTable& table, VecI bits) {
  return lookup16(table.codes, vreinterpretq_u32_s32(bits));
}
template <int kBlocks>
inline Vec spread_scales(const float* scales) {
  static_assert(kBlocks <= 2, "");
  return kBlocks == 1 ? splat(scales[0]) : Vec{scales[0], scales[0], scales[1], scales[1]};
}

// The nibbles of eight bytes, in the order of elements.
inline uint8x16_t nibbles_in_order(const uint8_t* packed) {
  const uint8x8_t bytes = vld1_u8(packed), even = vshr_n_u8(bytes, 4), odd = vand_u8(bytes, vdup_n_u8(15));
  return vcombine_u8(vzip1_u8(even, odd), vzip2_u8(even, odd));
}
// The high nibbles of the first eight bytes, then the low nibbles of the others.
inline uint8x16_t high_then_low(uint8x16_t bytes) {
  const int8x16_t shift = vcombine_s8(vdup_n_s8(-4), vdup_n_s8(0));
  return vandq_u8(vshlq_u8(bytes, shift), vdupq_n_u8(15));
}

template <class Out>
struct NibbleTable;

template <>
struct NibbleTable<float> {
  static constexpr int kStep = 16;
  uint8x16_t planes[4];  // byte i of each of the 16 values
  NibbleTable(const CodeValues& codes, float scale) {
    uint16x8_t words[4];
    for (int i = 0; i < 4; ++i) {
      words[i] = vreinterpretq_u16_f32(mul(load(codes.value + i * kLanes), splat(scale)));
    }
    const uint8x16_t low0 = vreinterpretq_u8_u16(vuzp1q_u16(words[0], words[1])),
                     low1 = vreinterpretq_u8_u16(vuzp1q_u16(words[2], words[3])),
                     high0 = vreinterpretq_u8_u16(vuzp2q_u16(words[0], words[1])),
                     high1 = vreinterpretq_u8_u16(vuzp2q_u16(words[2], words[3]));
    planes[0] = vuzp1q_u8(low0, low1);
    planes[1] = vuzp2q_u8(low0, low1);
    planes[2] = vuzp1q_u8(high0, high1);
    planes[3] = vuzp2q_u8(high0, high1);
  }
  void decode(const uint8_t* packed, float* out) const {
    const uint8x16_t index = nibbles_in_order(packed);
    const uint8x16_t b0 = vqtbl1q_u8(planes[0], index), b1 = vqtbl1q_u8(planes[1], index),
                     b2 = vqtbl1q_u8(planes[2], index), b3 = vqtbl1q_u8(planes[3], index);
    store_words(vzip1q_u8(b0, b1), vzip1q_u8(b2, b3), out, out + kLanes);
    store_words(vzip2q_u8(b0, b1), vzip2q_u8(b2, b3), out + 2 * kLanes, out + 3 * kLanes);
  }
  void decode_split(const uint8_t* packed, float* even, float* odd) const {
    uint32_t bytes;
    memcpy(&bytes, packed, sizeof(bytes));
    const int8x8_t shift = vcreate_s8(0x00000000fcfcfcfc);  // 0, and -4 below
    const uint8x8_t nibbles = vand_u8(vshl_u8(vreinterpret_u8_u32(vdup_n_u32(bytes)), shift), vdup_n_u8(15));
    const uint8x16_t index = vcombine_u8(nibbles, nibbles);
    const uint8x16_t b0 = vqtbl1q_u8(planes[0], index), b1 = vqtbl1q_u8(planes[1], index),
                     b2 = vqtbl1q_u8(planes[2], index), b3 = vqtbl1q_u8(planes[3], index);
    store_words(vzip1q_u8(b0, b1), vzip1q_u8(b2, b3), even, odd);
  }

 private:
  // Eight words from their low and high halves.
  static void store_words(uint8x16_t low, uint8x16_t high, float* first, float* second) {
    const uint16x8_t l = vreinterpretq_u16_u8(low), h = vreinterpretq_u16_u8(high);
    store(first, vreinterpretq_f32_u16(vzip1q_u16(l, h)));
    store(second, vreinterpretq_f32_u16(vzip2q_u16(l, h)));
  }
};

// The low and the high bytes of 16 values: codes times one scale.
struct HalfPlanes {
  uint8x16_t low, high;
  template <class Half>
  HalfPlanes(const CodeValues& codes, float scale, Half half) {
    uint16x4_t words[4];
    for (int i = 0; i < 4; ++i) words[i] = narrow(mul(load(codes.value + i * kLanes), splat(scale)), half);
    const uint8x16_t first = vreinterpretq_u8_u16(vcombine_u16(words[0], words[1])),
                     second = vreinterpretq_u8_u16(vcombine_u16(words[2], words[3]));
    low = vuzp1q_u8(first, second);
    high = vuzp2q_u8(first, second);
  }
};
// The values of 16 nibbles.
struct HalfValues {
  uint8x16_t first, second;
  HalfValues(const HalfPlanes& planes, uint8x16_t index) {
    const uint8x16_t l = vqtbl1q_u8(planes.low, index), h = vqtbl1q_u8(planes.high, index);
    first = vzip1q_u8(l, h);
    second = vzip2q_u8(l, h);
  }
  void store(void* out) const {
    vst1q_u8(static_cast<uint8_t*>(out), first);
    vst1q_u8(static_cast<uint8_t*>(out) + 16, second);
  }
};

template <class Half>
struct NibbleTable {
  static constexpr int kStep = 16;
  HalfPlanes planes;
  NibbleTable(const CodeValues& codes, float scale) : planes(codes, scale, Half{}) {}
  void decode(const uint8_t* packed, Half* out) const {
    HalfValues(planes, nibbles_in_order(packed)).store(out);
  }
};

// 4 rows of 4 lanes, in place.
inline void transpose(Vec (&rows)[kLanes]) {
  const float64x2_t a = vreinterpretq_f64_f32(vtrn1q_f32(rows[0], rows[1])),
                    b = vreinterpretq_f64_f32(vtrn2q_f32(rows[0], rows[1])),
                    c = vreinterpretq_f64_f32(vtrn1q_f32(rows[2], rows[3])),
                    d = vreinterpretq_f64_f32(vtrn2q_f32(rows[2], rows[3]));
  rows[0] = vreinterpretq_f32_f64(vtrn1q_f64(a, c));
  rows[1] = vreinterpretq_f32_f64(vtrn1q_f64(b, d));
  rows[2] = vreinterpretq_f32_f64(vtrn2q_f64(a, c));
  rows[3] = vreinterpretq_f32_f64(vtrn2q_f64(b, d));
}

typedef int32_t VecN __attribute__((vector_size(4 * kLanes)));

inline Vec square_root(Vec x) { return vsqrtq_f32(x); }
inline Vec gather(const float* table, VecN index) {
  return Vec{table[index[0]], table[index[1]], table[index[2]], table[index[3]]};
}
inline void store_low_bytes(uint8_t* p, VecN x) {
  const uint16x4_t words = vmovn_u32((uint32x4_t)x);
  const uint8x8_t bytes = vmovn_u16(vcombine_u16(words, words));
  const uint32_t four = vget_lane_u32(vreinterpret_u32_u8(bytes), 0);
  memcpy(p, &four, sizeof(four));
}
inline bool any_without(VecN x, int32_t bits) {
  return vminvq_u32(vtstq_s32((int32x4_t)x, vdupq_n_s32(bits))) == 0;
}

class SearchTables {
 public:
  explicit SearchTables(const CodeSearch& search) : slope_(load16(search.slope)) {
    for (int i = 0; i < 8; ++i) thresholds_[i] = splat(search.thresholds[i]);
  }
  VecN passed(Vec x) const {
    VecN found{};
    for (int i = 0; i < 8; ++i) found -= (VecN)vcgtq_f32(x, thresholds_[i]);
    return found;
  }
  static VecN in_exponent(VecN passed) { return passed << 23; }
  Vec slope(VecN passed) const { return lookup16(slope_, (uint32x4_t)passed); }

 private:
  Vec thresholds_[8];
  uint8x16x4_t slope_;
};
