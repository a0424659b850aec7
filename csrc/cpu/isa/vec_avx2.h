// AVX2 vectors (with FMA and F16C): 8 fp32 lanes. Same interface as vec_avx512.h, which documents it.

using Vec = __m256;
using VecI = __m256i;
constexpr int kLanes = 8;
constexpr int kRegisters = 16;
// Below this many multiply-adds, waking a second thread costs more than it saves.
constexpr int64_t kMultiplyAddsPerThread = 500'000;
// Register tiles, sized for 16 registers.
constexpr int kDotRows = 3;
constexpr int kOuterRows = 6;
constexpr int kOuterVecs = 2;

inline Vec zero() { return _mm256_setzero_ps(); }
inline Vec splat(float x) { return _mm256_set1_ps(x); }
inline Vec add(Vec a, Vec b) { return _mm256_add_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
inline Vec sub(Vec a, Vec b) { return _mm256_sub_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm256_div_ps(a, b); }
inline Vec min(Vec a, Vec x) { return _mm256_min_ps(a, x); }
inline Vec max(Vec a, Vec x) { return _mm256_max_ps(a, x); }
inline Vec by_sign(Vec x, Vec negative, Vec positive) { return _mm256_blendv_ps(positive, negative, x); }
inline Vec where_zero(Vec x, Vec value, Vec other) {
  return _mm256_blendv_ps(other, value, _mm256_cmp_ps(x, zero(), _CMP_EQ_OQ));
}
inline Vec low_bits_to_exponent(Vec x) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_castps_si256(x), 23));
}

inline Vec widen(__m128i bits, BF16) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
inline Vec widen(__m128i bits, F16) { return _mm256_cvtph_ps(bits); }
inline float float_of_half(uint16_t bits) { return _cvtsh_ss(bits); }

inline Vec load(const float* p) { return _mm256_loadu_ps(p); }
template <class Half>
inline Vec load(const Half* p) {
  return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)), Half{});
}

template <class T>
inline Vec load_part(const T* p, int64_t count) {
  T lanes[kLanes] = {};
  memcpy(lanes, p, count * sizeof(T));
  return load(lanes);
}

inline __m128i narrow(Vec x, BF16) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m256i high = _mm256_blendv_epi8(_mm256_srli_epi32(rounded, 16), _mm256_set1_epi32(0x7fc0), nan);
  return _mm_packus_epi32(_mm256_castsi256_si128(high), _mm256_extracti128_si256(high, 1));
}
inline __m128i narrow(Vec x, F16) {
  return _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

inline void store(float* p, Vec x) { _mm256_storeu_ps(p, x); }
template <class Half>
inline void store(Half* p, Vec x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow(x, Half{}));
}

template <class T>
inline void store_part(T* p, Vec x, int64_t count) {
  T lanes[kLanes];
  store(lanes, x);
  memcpy(p, lanes, count * sizeof(T));
}

using VecW = __m256i;
inline VecW count_from(uint64_t first) {
  return _mm256_add_epi64(_mm256_set1_epi64x(static_cast<int64_t>(first)), _mm256_set_epi64x(3, 2, 1, 0));
}
inline VecW splat_word(uint32_t x) { return _mm256_set1_epi64x(x); }
inline VecW multiply_low(VecW a, VecW b) { return _mm256_mul_epu32(a, b); }
inline VecW high_half(VecW a) { return _mm256_srli_epi64(a, 32); }
inline VecW xor3(VecW a, VecW b, VecW c) { return _mm256_xor_si256(_mm256_xor_si256(a, b), c); }
inline void store_blocks(uint32_t* out, VecW w0, VecW w1, VecW w2, VecW w3) {
  const VecW w01 = _mm256_blend_epi32(w0, _mm256_slli_epi64(w1, 32), 0xaa);
  const VecW w23 = _mm256_blend_epi32(w2, _mm256_slli_epi64(w3, 32), 0xaa);
  const VecW even = _mm256_unpacklo_epi64(w01, w23), odd = _mm256_unpackhi_epi64(w01, w23);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permute2x128_si256(even, odd, 0x20));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + kLanes), _mm256_permute2x128_si256(even, odd, 0x31));
}
inline Vec keep_factors(const uint32_t* words, uint32_t threshold, float scale) {
  const __m256i w = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
  const __m256i limit = _mm256_set1_epi32(static_cast<int32_t>(threshold));
  return _mm256_and_ps(_mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_max_epu32(w, limit), w)), splat(scale));
}

inline void add_lane_sums(Vec a, Vec b, Vec c, Vec d, float* out) {
  const Vec abcd = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm_loadu_ps(out), sums));
}

inline VecI zero_bits() { return _mm256_setzero_si256(); }
inline VecI max_bits(VecI a, Vec x) { return _mm256_max_epi32(a, _mm256_castps_si256(x)); }
inline VecI max_abs_bits(VecI a, Vec x) {
  return _mm256_max_epi32(a, _mm256_and_si256(_mm256_castps_si256(x), _mm256_set1_epi32(0x7fffffff)));
}
inline int32_t reduce_max(VecI a) {
  __m128i m = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0x4e));
  m = _mm_max_epi32(m, _mm_shuffle_epi32(m, 0xb1));
  return _mm_cvtsi128_si32(m);
}
inline VecI double_plus_greater(VecI index, Vec a, Vec b) {
  const __m256i greater = _mm256_castps_si256(_mm256_cmp_ps(a, b, _CMP_GT_OQ));  // -1 where true
  return _mm256_sub_epi32(_mm256_add_epi32(index, index), greater);
}
inline Vec lookup8(const float* table, VecI index) {
  return _mm256_permutevar8x32_ps(_mm256_load_ps(table), index);
}
inline void store_nibbles(uint8_t* p, VecI codes) {
  const __m256i pairs = _mm256_or_si256(_mm256_slli_epi64(codes, 4), _mm256_srli_epi64(codes, 32));
  // The low byte of each 64-bit lane, two from each half.
  const __m256i low = _mm256_shuffle_epi8(pairs, _mm256_set1_epi32(0x00000800));
  const uint32_t first = _mm256_extract_epi16(low, 0) & 0xffff,
                 second = _mm256_extract_epi16(low, 8) & 0xffff;
  const uint32_t bytes = first | (second << 16);
  memcpy(p, &bytes, sizeof(bytes));
}

struct CodeTable {
  Vec low, high;  // codes 0-7 and 8-15
  explicit CodeTable(const CodeValues& codes) : low(load(codes.value)), high(load(codes.value + 8)) {}
};
inline VecI load_bytes(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
inline VecI next_nibble(VecI bits) { return _mm256_srli_epi32(bits, 4); }
inline Vec lookup_code(const CodeTable& table, VecI bits) {
  // vpermps reads three bits of an index; the fourth, moved to the sign, selects the half.
  const Vec half = _mm256_castsi256_ps(_mm256_slli_epi32(bits, 28));
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.low, bits),
                          _mm256_permutevar8x32_ps(table.high, bits), half);
}
template <int kBlocks>
inline Vec spread_scales(const float* scales) {
  if constexpr (kBlocks == 1) {
    return splat(scales[0]);
  } else if constexpr (kBlocks == 2) {
    return _mm256_set_m128(_mm_set1_ps(scales[1]), _mm_set1_ps(scales[0]));
  } else {
    const __m256i lane = _mm256_set_epi32(3, 3, 2, 2, 1, 1, 0, 0);
    return _mm256_permutevar8x32_ps(_mm256_castps128_ps256(_mm_loadu_ps(scales)), lane);
  }
}

template <class Out>
struct NibbleTable;

template <>
struct NibbleTable<float> {
  static constexpr int kStep = 8;
  CodeTable table;
  NibbleTable(const CodeValues& codes, float scale) : table(codes) {
    table.low = mul(table.low, splat(scale));
    table.high = mul(table.high, splat(scale));
  }
  void decode(const uint8_t* packed, float* out) const {
    int32_t bytes;
    memcpy(&bytes, packed, sizeof(bytes));
    const __m256i spread = _mm256_set_epi8(-1, -1, -1, 3, -1, -1, -1, 3, -1, -1, -1, 2, -1, -1, -1, 2,  //
                                           -1, -1, -1, 1, -1, -1, -1, 1, -1, -1, -1, 0, -1, -1, -1, 0);
    const __m256i index =
        _mm256_srlv_epi32(_mm256_shuffle_epi8(_mm256_set1_epi32(bytes), spread), _mm256_set1_epi64x(4));
    store(out, lookup_code(table, index));
  }
  void decode_split(const uint8_t* packed, float* even, float* odd) const {
    const VecI bytes = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(packed)));
    store(even, lookup_code(table, next_nibble(bytes)));
    store(odd, lookup_code(table, bytes));
  }
};

template <class Half>
struct NibbleTable {
  static constexpr int kStep = 32;
  __m256i low, high;  // low and high bytes of the 16 values, in both halves: pshufb looks up bytes
  NibbleTable(const CodeValues& codes, float scale) {
    const __m128i a = narrow(mul(load(codes.value), splat(scale)), Half{});
    const __m128i b = narrow(mul(load(codes.value + 8), splat(scale)), Half{});
    const __m128i byte = _mm_set1_epi16(0xff);
    low = _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_and_si128(a, byte), _mm_and_si128(b, byte)));
    high = _mm256_broadcastsi128_si256(_mm_packus_epi16(_mm_srli_epi16(a, 8), _mm_srli_epi16(b, 8)));
  }
  void decode(const uint8_t* packed, Half* out) const {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(packed));
    const __m128i even = _mm_and_si128(_mm_srli_epi16(bytes, 4), _mm_set1_epi8(15));
    const __m128i odd = _mm_and_si128(bytes, _mm_set1_epi8(15));
    const __m256i index = _mm256_set_m128i(_mm_unpackhi_epi8(even, odd), _mm_unpacklo_epi8(even, odd));
    const __m256i l = _mm256_shuffle_epi8(low, index), h = _mm256_shuffle_epi8(high, index);
    const __m256i a = _mm256_unpacklo_epi8(l, h), b = _mm256_unpackhi_epi8(l, h);
    __m256i* p = reinterpret_cast<__m256i*>(out);
    _mm256_storeu_si256(p, _mm256_permute2x128_si256(a, b, 0x20));
    _mm256_storeu_si256(p + 1, _mm256_permute2x128_si256(a, b, 0x31));
  }
};

// 8 rows of 8 lanes, in place.
inline void transpose(Vec (&rows)[kLanes]) {
  Vec pairs[kLanes], quads[kLanes];
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; i += 2) {
    pairs[i] = _mm256_unpacklo_ps(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm256_unpackhi_ps(rows[i], rows[i + 1]);
  }
  // quads[i + c] holds columns c and c + 4 of rows i to i + 3 in its two halves.
#pragma GCC unroll 2
  for (int i = 0; i < kLanes; i += 4) {
    quads[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
    quads[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
    quads[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
    quads[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    rows[c] = _mm256_permute2f128_ps(quads[c], quads[c + 4], 0x20);
    rows[c + 4] = _mm256_permute2f128_ps(quads[c], quads[c + 4], 0x31);
  }
}

typedef int32_t VecN __attribute__((vector_size(4 * kLanes)));

inline Vec square_root(Vec x) { return _mm256_sqrt_ps(x); }
inline Vec gather(const float* table, VecN index) { return _mm256_i32gather_ps(table, (__m256i)index, 4); }
inline void store_low_bytes(uint8_t* p, VecN x) {
  x &= 0xff;
  const __m128i words =
      _mm_packus_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
}
inline bool any_without(VecN x, int32_t bits) { return _mm256_movemask_ps((Vec)((x & bits) == 0)) != 0; }

// The number of thresholds below x >= 0 is found by binary search, as vpermps looks up eight entries.
class SearchTables {
 public:
  explicit SearchTables(const CodeSearch& search)
      : second_(load(search.second)),
        third_(load(search.third)),
        slope_(load(search.slope)),
        first_(splat(search.thresholds[3])),
        fourth_(splat(search.thresholds[7])) {}
  VecN passed(Vec x) const {
    VecN found = -(x > first_);
    found += found - (x > at(second_, found));
    found += found - (x > at(third_, found));
    return found - (x > fourth_);
  }
  static VecN in_exponent(VecN passed) { return passed << 23; }
  Vec slope(VecN passed) const { return at(slope_, passed); }

 private:
  static Vec at(Vec table, VecN i) { return _mm256_permutevar8x32_ps(table, (__m256i)i); }
  Vec second_, third_, slope_, first_, fourth_;
};
