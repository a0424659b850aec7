// AVX-512 vectors (F, BW, DQ, VL): 16 fp32 lanes. Included in the ISA's own namespace, after the target
// pragma. Each vec_*.h offers the same names; the .inl kernels are written in them. Constructors are
// explicit, because the compiler defines implicit ones at the end of the file, where the target pragma no
// longer holds.

using Vec = __m512;
using VecI = __m512i;
constexpr int kLanes = 16;
constexpr int kRegisters = 32;
// Below this many multiply-adds, waking a second thread costs more than it saves.
constexpr int64_t kMultiplyAddsPerThread = PEFT_KERNELS_BF16_DOT ? 1'500'000 : 750'000;
// Register tiles, sized for 32 registers. dot: rows of lhs by 4 rows of the panel; outer: rows by vectors.
constexpr int kDotRows = 6;
constexpr int kOuterRows = 6;
constexpr int kOuterVecs = 4;

inline Vec zero() { return _mm512_setzero_ps(); }
inline Vec splat(float x) { return _mm512_set1_ps(x); }
inline Vec add(Vec a, Vec b) { return _mm512_add_ps(a, b); }
inline Vec mul(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
inline Vec fma(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }
inline Vec sub(Vec a, Vec b) { return _mm512_sub_ps(a, b); }
inline Vec div(Vec a, Vec b) { return _mm512_div_ps(a, b); }
// With the constant first, a NaN in x propagates.
inline Vec min(Vec a, Vec x) { return _mm512_min_ps(a, x); }
inline Vec max(Vec a, Vec x) { return _mm512_max_ps(a, x); }
// In each lane, `negative` where the sign bit of x is set.
inline Vec by_sign(Vec x, Vec negative, Vec positive) {
  return _mm512_mask_mov_ps(positive, _mm512_movepi32_mask(_mm512_castps_si512(x)), negative);
}
// In each lane, `other` where x is not 0.
inline Vec where_zero(Vec x, Vec value, Vec other) {
  return _mm512_mask_mov_ps(other, _mm512_cmp_ps_mask(x, zero(), _CMP_EQ_OQ), value);
}
// The low nine bits of each lane moved to the top, as sign and exponent.
inline Vec low_bits_to_exponent(Vec x) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_castps_si512(x), 23));
}

inline Vec widen(__m256i bits, BF16) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
inline Vec widen(__m256i bits, F16) { return _mm512_cvtph_ps(bits); }
inline float float_of_half(uint16_t bits) { return _cvtsh_ss(bits); }

inline Vec load(const float* p) { return _mm512_loadu_ps(p); }
template <class Half>
inline Vec load(const Half* p) {
  return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)), Half{});
}

// gcc's sanitizers do not see masked memory accesses: sanitizer builds repeat them as plain ones.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
inline void show_masked_load(const void* p, int64_t bytes) {
  char copy[sizeof(Vec)];
  memcpy(copy, p, bytes);
  __asm__ volatile("" ::"r"(copy) : "memory");
}
inline void show_masked_store(void* p, int64_t bytes) {
  char copy[sizeof(Vec)];
  memcpy(copy, p, bytes);
  __asm__ volatile("" ::"r"(copy) : "memory");
  memcpy(p, copy, bytes);
}
#else
inline void show_masked_load(const void*, int64_t) {}
inline void show_masked_store(void*, int64_t) {}
#endif

// The first `count` < kLanes elements, the other lanes zero; nothing past them is read.
inline Vec load_part(const float* p, int64_t count) {
  show_masked_load(p, count * sizeof(*p));
  return _mm512_maskz_loadu_ps((1u << count) - 1, p);
}
template <class Half>
inline Vec load_part(const Half* p, int64_t count) {
  show_masked_load(p, count * sizeof(*p));
  return widen(_mm256_maskz_loadu_epi16((1u << count) - 1, p), Half{});
}

// Round to nearest even; a NaN becomes the quiet NaN 0x7fc0, as in torch.
inline __m256i narrow(Vec x, BF16) {
#if PEFT_KERNELS_BF16_DOT
  // The instruction differs only for subnormals, which it flushes to zero, and NaNs.
  constexpr int kSubnormalOrNan = 0x20 | 0x01 | 0x80;
  if (__builtin_expect(!_mm512_fpclass_ps_mask(x, kSubnormalOrNan), 1)) {
    return (__m256i)_mm512_cvtneps_pbh(x);
  }
#endif
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  return _mm512_cvtepi32_epi16(
      _mm512_mask_mov_epi32(_mm512_srli_epi32(rounded, 16), nan, _mm512_set1_epi32(0x7fc0)));
}
inline __m256i narrow(Vec x, F16) {
  return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

inline void store(float* p, Vec x) { _mm512_storeu_ps(p, x); }
template <class Half>
inline void store(Half* p, Vec x) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(x, Half{}));
}

inline void store_part(float* p, Vec x, int64_t count) {
  _mm512_mask_storeu_ps(p, (1u << count) - 1, x);
  show_masked_store(p, count * sizeof(*p));
}
template <class Half>
inline void store_part(Half* p, Vec x, int64_t count) {
  _mm256_mask_storeu_epi16(p, (1u << count) - 1, narrow(x, Half{}));
  show_masked_store(p, count * sizeof(*p));
}

// out[0..3] += the sums over the lanes of a, b, c and d.
inline void add_lane_sums(Vec a, Vec b, Vec c, Vec d, float* out) {
  const Vec ab = add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
  const Vec cd = add(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
  const __m512d ab2 = _mm512_castps_pd(ab), cd2 = _mm512_castps_pd(cd);
  const Vec abcd =
      add(_mm512_castpd_ps(_mm512_unpacklo_pd(ab2, cd2)), _mm512_castpd_ps(_mm512_unpackhi_pd(ab2, cd2)));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  const __m128 sums = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm_loadu_ps(out), sums));
}

// Quantisation. max_abs_bits orders |x| as integers, with Inf and NaN above every finite value.
inline VecI zero_bits() { return _mm512_setzero_si512(); }
inline VecI max_bits(VecI a, Vec x) { return _mm512_max_epi32(a, _mm512_castps_si512(x)); }
inline VecI max_abs_bits(VecI a, Vec x) {
  return _mm512_max_epi32(a, _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff)));
}
inline int32_t reduce_max(VecI a) { return _mm512_reduce_max_epi32(a); }
inline VecI double_plus_greater(VecI index, Vec a, Vec b) {
  const __m512i doubled = _mm512_add_epi32(index, index);
  return _mm512_mask_add_epi32(doubled, _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ), doubled, _mm512_set1_epi32(1));
}
inline Vec lookup8(const float* table, VecI index) {
  return _mm512_permutexvar_ps(index, _mm512_castps256_ps512(_mm256_load_ps(table)));
}
// kLanes codes into kLanes / 2 bytes, even lanes in the high nibble.
inline void store_nibbles(uint8_t* p, VecI codes) {
  const __m512i pairs = _mm512_or_si512(_mm512_slli_epi64(codes, 4), _mm512_srli_epi64(codes, 32));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm512_cvtepi64_epi8(pairs));
}

// Philox: one block of the generator per 64-bit lane, of which only the low half is used.
using VecW = __m512i;
inline VecW count_from(uint64_t first) {
  return _mm512_add_epi64(_mm512_set1_epi64(static_cast<int64_t>(first)),
                          _mm512_set_epi64(7, 6, 5, 4, 3, 2, 1, 0));
}
inline VecW splat_word(uint32_t x) { return _mm512_set1_epi64(x); }
inline VecW multiply_low(VecW a, VecW b) { return _mm512_mul_epu32(a, b); }
inline VecW high_half(VecW a) { return _mm512_srli_epi64(a, 32); }
inline VecW xor3(VecW a, VecW b, VecW c) { return _mm512_ternarylogic_epi64(a, b, c, 0x96); }
// The four words of each block, side by side.
inline void store_blocks(uint32_t* out, VecW w0, VecW w1, VecW w2, VecW w3) {
  const VecW w01 = _mm512_mask_mov_epi32(w0, 0xaaaa, _mm512_slli_epi64(w1, 32));
  const VecW w23 = _mm512_mask_mov_epi32(w2, 0xaaaa, _mm512_slli_epi64(w3, 32));
  const VecW first = _mm512_set_epi64(11, 3, 10, 2, 9, 1, 8, 0),
             second = _mm512_set_epi64(15, 7, 14, 6, 13, 5, 12, 4);
  _mm512_storeu_si512(out, _mm512_permutex2var_epi64(w01, first, w23));
  _mm512_storeu_si512(out + kLanes, _mm512_permutex2var_epi64(w01, second, w23));
}
// `scale` in lanes whose word is at least `threshold`, else 0.
inline Vec keep_factors(const uint32_t* words, uint32_t threshold, float scale) {
  const __m512i limit = _mm512_set1_epi32(static_cast<int32_t>(threshold));
  return _mm512_maskz_mov_ps(_mm512_cmpge_epu32_mask(_mm512_loadu_si512(words), limit), splat(scale));
}

// The codes of a packed weight, eight per lane. lookup_code reads the lowest nibble of each lane.
struct CodeTable {
  Vec codes;
  explicit CodeTable(const CodeValues& from) : codes(load(from.value)) {}
};
inline VecI load_bytes(const uint8_t* p) { return _mm512_loadu_si512(p); }
inline VecI next_nibble(VecI bits) { return _mm512_srli_epi32(bits, 4); }
inline Vec lookup_code(const CodeTable& table, VecI bits) { return _mm512_permutexvar_ps(bits, table.codes); }
// scales[0 .. kBlocks - 1], each broadcast over its share of the lanes.
template <int kBlocks>
inline Vec spread_scales(const float* scales) {
  if constexpr (kBlocks == 1) {
    return splat(scales[0]);
  } else if constexpr (kBlocks == 2) {
    return _mm512_insertf32x8(splat(scales[0]), _mm256_set1_ps(scales[1]), 1);
  } else if constexpr (kBlocks == 4) {
    const __m512i lane = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
    return _mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_loadu_ps(scales)), lane);
  } else {
    const __m512i lane = _mm512_set_epi32(7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0);
    return _mm512_permutexvar_ps(lane, _mm512_castps256_ps512(_mm256_loadu_ps(scales)));
  }
}

// A code table times one absmax: decoding is a permutation, and each value is rounded as code * absmax is.
template <class Out>
struct NibbleTable;

template <>
struct NibbleTable<float> {
  static constexpr int kStep = 16;  // nibbles per step
  Vec table;
  NibbleTable(const CodeValues& codes, float scale) : table(mul(load(codes.value), splat(scale))) {}
  void decode(const uint8_t* packed, float* out) const {
    int64_t bytes;
    memcpy(&bytes, packed, sizeof(bytes));
    // Byte 2L of lane L twice, then byte 2L + 1 twice; the shift brings the high nibble of the first down.
    // vpermps reads only the low four bits of an index, so no mask is needed.
    const __m512i spread = _mm512_set_epi8(-1, -1, -1, 7, -1, -1, -1, 7, -1, -1, -1, 6, -1, -1, -1, 6,  //
                                           -1, -1, -1, 5, -1, -1, -1, 5, -1, -1, -1, 4, -1, -1, -1, 4,  //
                                           -1, -1, -1, 3, -1, -1, -1, 3, -1, -1, -1, 2, -1, -1, -1, 2,  //
                                           -1, -1, -1, 1, -1, -1, -1, 1, -1, -1, -1, 0, -1, -1, -1, 0);
    const __m512i index = _mm512_shuffle_epi8(_mm512_set1_epi64(bytes), spread);
    store(out, _mm512_permutexvar_ps(_mm512_srlv_epi32(index, _mm512_set1_epi64(4)), table));
  }
  // The even and the odd elements of 2 * kLanes separately: they are the high and the low nibbles, so nothing
  // has to be interleaved.
  void decode_split(const uint8_t* packed, float* even, float* odd) const {
    const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
    store(even, _mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), table));
    store(odd, _mm512_permutexvar_ps(bytes, table));
  }
};

// The even and the odd elements of two blocks of kLanes elements: each block has half of the lanes.
inline void decode_split_blocks(const CodeValues& codes, float scale0, float scale1, const uint8_t* packed,
                                float* out) {
  const __m512i bytes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
  const Vec values = load(codes.value);
  const Vec scale = _mm512_insertf32x8(splat(scale0), _mm256_set1_ps(scale1), 1);
  store(out, mul(_mm512_permutexvar_ps(_mm512_srli_epi32(bytes, 4), values), scale));
  store(out + kLanes, mul(_mm512_permutexvar_ps(bytes, values), scale));
}

template <class Half>
struct NibbleTable {
  static constexpr int kStep = 32;
  __m512i table;  // the 16 values twice: vpermw reads five bits of an index
  NibbleTable(const CodeValues& codes, float scale)
      : table(_mm512_broadcast_i64x4(narrow(mul(load(codes.value), splat(scale)), Half{}))) {}
  void decode(const uint8_t* packed, Half* out) const {
    const __m512i bytes = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(packed)));
    const __m512i spread = _mm512_set_epi8(-1, 15, -1, 15, -1, 14, -1, 14, -1, 13, -1, 13, -1, 12, -1, 12,  //
                                           -1, 11, -1, 11, -1, 10, -1, 10, -1, 9, -1, 9, -1, 8, -1, 8,      //
                                           -1, 7, -1, 7, -1, 6, -1, 6, -1, 5, -1, 5, -1, 4, -1, 4,          //
                                           -1, 3, -1, 3, -1, 2, -1, 2, -1, 1, -1, 1, -1, 0, -1, 0);
    const __m512i index = _mm512_srlv_epi16(_mm512_shuffle_epi8(bytes, spread), _mm512_set1_epi32(4));
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(index, table));
  }
};

// 16 rows of 16 lanes, in place.
inline void transpose(Vec (&rows)[kLanes]) {
  __m512d pairs[kLanes];
#pragma GCC unroll 4
  for (int i = 0; i < kLanes; i += 4) {
    const __m512d low01 = _mm512_castps_pd(_mm512_unpacklo_ps(rows[i], rows[i + 1])),
                  high01 = _mm512_castps_pd(_mm512_unpackhi_ps(rows[i], rows[i + 1])),
                  low23 = _mm512_castps_pd(_mm512_unpacklo_ps(rows[i + 2], rows[i + 3])),
                  high23 = _mm512_castps_pd(_mm512_unpackhi_ps(rows[i + 2], rows[i + 3]));
    pairs[i] = _mm512_unpacklo_pd(low01, low23);
    pairs[i + 1] = _mm512_unpackhi_pd(low01, low23);
    pairs[i + 2] = _mm512_unpacklo_pd(high01, high23);
    pairs[i + 3] = _mm512_unpackhi_pd(high01, high23);
  }
  // pairs[i + c] now holds column 4q + c of rows i to i + 3 in its 128-bit lane q.
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const __m512d even_low = _mm512_shuffle_f64x2(pairs[c], pairs[c + 4], 0x88),
                  odd_low = _mm512_shuffle_f64x2(pairs[c], pairs[c + 4], 0xdd),
                  even_high = _mm512_shuffle_f64x2(pairs[c + 8], pairs[c + 12], 0x88),
                  odd_high = _mm512_shuffle_f64x2(pairs[c + 8], pairs[c + 12], 0xdd);
    rows[c] = _mm512_castpd_ps(_mm512_shuffle_f64x2(even_low, even_high, 0x88));
    rows[c + 4] = _mm512_castpd_ps(_mm512_shuffle_f64x2(odd_low, odd_high, 0x88));
    rows[c + 8] = _mm512_castpd_ps(_mm512_shuffle_f64x2(even_low, even_high, 0xdd));
    rows[c + 12] = _mm512_castpd_ps(_mm512_shuffle_f64x2(odd_low, odd_high, 0xdd));
  }
}

// Lanes as integers, for C operators.
typedef int32_t VecN __attribute__((vector_size(4 * kLanes)));

inline Vec square_root(Vec x) { return _mm512_sqrt_ps(x); }
inline Vec gather(const float* table, VecN index) { return _mm512_i32gather_ps((__m512i)index, table, 4); }
// The low byte of each lane.
inline void store_low_bytes(uint8_t* p, VecN x) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8((__m512i)x));
}
// Whether all of `bits` are 0 in any lane.
inline bool any_without(VecN x, int32_t bits) {
  return _mm512_testn_epi32_mask((__m512i)x, _mm512_set1_epi32(bits)) != 0;
}

// The tables of dynamic_tables.h in registers. Each binade has at most one threshold, so the binade of x and
// one comparison give the number of thresholds passed.
class SearchTables {
 public:
  explicit SearchTables(const CodeSearch& search)
      : border_{words(search.border), words(search.border + kLanes)},
        before_{words(search.before), words(search.before + kLanes)},
        slope_(words(search.slope)) {}
  // The number of thresholds below x >= 0, in the exponent's bits and in the lowest.
  VecN passed(Vec x) const {
    const __m512i binade = _mm512_srli_epi32((__m512i)max(splat(CodeSearch::kLeast), x), 23);
    const __m512i border = _mm512_permutex2var_epi32(border_[0], binade, border_[1]),
                  before = _mm512_permutex2var_epi32(before_[0], binade, before_[1]);
    const __mmask16 over = _mm512_cmp_ps_mask(x, (Vec)border, _CMP_GT_OQ);
    return (VecN)_mm512_mask_add_epi32(before, over, before, _mm512_set1_epi32(1 << 23 | 1));
  }
  static VecN in_exponent(VecN passed) { return passed; }
  Vec slope(VecN passed) const { return (Vec)_mm512_permutexvar_epi32((__m512i)passed, slope_); }

 private:
  static __m512i words(const void* p) { return _mm512_loadu_si512(p); }
  __m512i border_[2], before_[2], slope_;
};
