// Pairs of bf16 in 32-bit lanes (vdpbf16ps), in addition to avx512's vectors.

// A bf16 in a panel, never in a result: the conversion instruction flushes subnormals to zero.
struct PanelBF16 {
  uint16_t bits;
};
inline __m256i narrow(Vec x, PanelBF16) { return (__m256i)_mm512_cvtneps_pbh(x); }

using VecPairs = __m512bh;

inline VecPairs load_pairs(const void* p) { return (__m512bh)_mm512_loadu_si512(p); }
inline VecPairs load_pairs_part(const void* p, int64_t count) {
  show_masked_load(p, count * sizeof(PanelBF16));
  return (__m512bh)_mm512_maskz_loadu_epi16((__mmask32{1} << count) - 1, p);
}
inline Vec as_floats(VecPairs x) { return (Vec)x; }
inline void store_bits(uint32_t* p, Vec x) { _mm512_storeu_ps(p, x); }
inline VecPairs splat_pair(const void* p) {
  int32_t pair;
  memcpy(&pair, p, sizeof(pair));
  return (__m512bh)_mm512_set1_epi32(pair);
}
// sum[i] + a[2i] * b[2i] + a[2i + 1] * b[2i + 1]
inline Vec dot_pairs(VecPairs a, VecPairs b, Vec sum) { return _mm512_dpbf16_ps(sum, a, b); }

// a0 b0 a1 b1 ... of 32 elements each.
inline void interleave_pairs(VecPairs a, VecPairs b, PanelBF16* out) {
  const __m512i x = (__m512i)a, y = (__m512i)b;
  const __m512i low = _mm512_unpacklo_epi16(x, y),
                high = _mm512_unpackhi_epi16(x, y);  // within 128-bit lanes
  const __m512i first = _mm512_set_epi64(11, 10, 3, 2, 9, 8, 1, 0);
  const __m512i second = _mm512_set_epi64(15, 14, 7, 6, 13, 12, 5, 4);
  _mm512_storeu_si512(out, _mm512_permutex2var_epi64(low, first, high));
  _mm512_storeu_si512(out + 2 * kLanes, _mm512_permutex2var_epi64(low, second, high));
}

// a and b rounded, as a pair in each lane.
inline Vec pair_lanes(__m512i halves) {  // all of a, then all of b
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8,  //
                                         23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return (Vec)_mm512_permutexvar_epi16(order, halves);
}
inline Vec pair_lanes(Vec a, Vec b, PanelBF16) { return pair_lanes((__m512i)_mm512_cvtne2ps_pbh(b, a)); }
inline Vec pair_lanes(Vec a, Vec b, BF16 type) {
  return pair_lanes(_mm512_inserti64x4(_mm512_castsi256_si512(narrow(a, type)), narrow(b, type), 1));
}

inline void store_pairs(void* p, VecPairs x) { _mm512_storeu_si512(p, (__m512i)x); }

// The even and the odd of 64 elements.
struct EvenOdd {
  VecPairs even, odd;
};
inline EvenOdd even_odd(VecPairs first, VecPairs second) {
  const __m512i evens = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34, 32,  //
                                         30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odds = _mm512_add_epi16(evens, _mm512_set1_epi16(1));
  return {(__m512bh)_mm512_permutex2var_epi16((__m512i)first, evens, (__m512i)second),
          (__m512bh)_mm512_permutex2var_epi16((__m512i)first, odds, (__m512i)second)};
}

// 32 bytes in lanes of 16 bits.
inline __m512i bytes_in_lanes(const uint8_t* packed) {
  return _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(packed)));
}

// Decodes 64 elements with one scale, the even before the odd: they are the high and the low nibbles, so
// nothing has to be interleaved.
struct EvenOddTable {
  __m512i table;  // the 16 values twice: vpermw reads five bits of an index
  EvenOddTable(const CodeValues& codes, float scale)
      : table(_mm512_broadcast_i64x4(narrow(mul(load(codes.value), splat(scale)), PanelBF16{}))) {}
  void decode(const uint8_t* packed, PanelBF16* out) const {
    const __m512i bytes = bytes_in_lanes(packed);
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(_mm512_srli_epi16(bytes, 4), table));
    _mm512_storeu_si512(out + 32, _mm512_permutexvar_epi16(bytes, table));
  }
};

// Decodes two rows with a scale each, interleaved: the 32 entries that vpermw reads hold both tables.
struct PairTable {
  static constexpr int kStep = 16;  // columns
  __m512i table;
  PairTable() : table(_mm512_setzero_si512()) {}
  PairTable(const CodeValues& codes, float scale0, float scale1)
      : PairTable(load(codes.value), scale0, load(codes.value), scale1) {}
  PairTable(const CodeValues& codes0, float scale0, const CodeValues& codes1, float scale1)
      : PairTable(load(codes0.value), scale0, load(codes1.value), scale1) {}
  PairTable(Vec values0, float scale0, Vec values1, float scale1)
      : table((__m512i)_mm512_cvtne2ps_pbh(mul(values1, splat(scale1)), mul(values0, splat(scale0)))) {}
  // By the lowest nibble of each 16-bit lane: the lower half of the lanes with scale0, the upper with
  // scale1.
  VecPairs lookup_halves(VecI bits) const {
    const __m512i upper = _mm512_inserti64x4(_mm512_setzero_si512(), _mm256_set1_epi16(16), 1);
    constexpr int kAndThenOr = 0xea;  // (a & b) | c
    const __m512i index = _mm512_ternarylogic_epi32(bits, _mm512_set1_epi16(15), upper, kAndThenOr);
    return (__m512bh)_mm512_permutexvar_epi16(index, table);
  }
  // 64 elements of two blocks, the even before the odd.
  void decode_even_odd(const uint8_t* packed, PanelBF16* out) const {
    const __m512i bytes = bytes_in_lanes(packed);
    store_pairs(out, lookup_halves((VecI)_mm512_srli_epi16(bytes, 4)));
    store_pairs(out + 32, lookup_halves((VecI)bytes));
  }
  void decode(const uint8_t* packed0, const uint8_t* packed1, PanelBF16* out) const {
    int64_t bytes0, bytes1;
    memcpy(&bytes0, packed0, sizeof(bytes0));
    memcpy(&bytes1, packed1, sizeof(bytes1));
    const __m512i bytes = _mm512_broadcast_i32x4(_mm_set_epi64x(bytes1, bytes0));
    // Columns 2c and 2c + 1 share byte c; row 1 is eight bytes above row 0.
    const __m512i spread = _mm512_set_epi8(-1, 15, -1, 7, -1, 15, -1, 7, -1, 14, -1, 6, -1, 14, -1, 6,  //
                                           -1, 13, -1, 5, -1, 13, -1, 5, -1, 12, -1, 4, -1, 12, -1, 4,  //
                                           -1, 11, -1, 3, -1, 11, -1, 3, -1, 10, -1, 2, -1, 10, -1, 2,  //
                                           -1, 9, -1, 1, -1, 9, -1, 1, -1, 8, -1, 0, -1, 8, -1, 0);
    const __m512i index =
        _mm512_srlv_epi16(_mm512_shuffle_epi8(bytes, spread), _mm512_set1_epi64(0x00040004));
    constexpr int kAndThenOr = 0xea;  // (a & b) | c
    const __m512i chosen = _mm512_ternarylogic_epi32(index, _mm512_set1_epi32(0x000f000f),
                                                     _mm512_set1_epi32(0x00100000), kAndThenOr);
    _mm512_storeu_si512(out, _mm512_permutexvar_epi16(chosen, table));
  }
};

// Decodes four blocks, each with a quarter of the lanes. A permutation of two registers covers 64 entries.
struct QuadTable {
  __m512i first, second;  // of two blocks each
  QuadTable(const CodeValues& codes, float scale0, float scale1, float scale2, float scale3)
      : first(PairTable(codes, scale0, scale1).table), second(PairTable(codes, scale2, scale3).table) {}
  // By the lowest nibble of each 16-bit lane.
  VecPairs lookup_quarters(__m512i bits) const {
    const __m512i quarter =
        _mm512_set_epi64(0x0030003000300030, 0x0030003000300030, 0x0020002000200020, 0x0020002000200020,
                         0x0010001000100010, 0x0010001000100010, 0, 0);
    constexpr int kAndThenOr = 0xea;  // (a & b) | c
    const __m512i index = _mm512_ternarylogic_epi32(bits, _mm512_set1_epi16(15), quarter, kAndThenOr);
    return (__m512bh)_mm512_permutex2var_epi16(first, index, second);
  }
  // 64 elements, the even before the odd.
  void decode_even_odd(const uint8_t* packed, PanelBF16* out) const {
    const __m512i bytes = bytes_in_lanes(packed);
    store_pairs(out, lookup_quarters(_mm512_srli_epi16(bytes, 4)));
    store_pairs(out + 32, lookup_quarters(bytes));
  }
};

// The codes as bf16 for 16-bit lanes, times bf16_factor.
struct PairCodeTable {
  __m512i codes;  // the 16 codes twice: vpermw reads five bits of an index
  explicit PairCodeTable(const CodeValues& from) {
    const Vec scaled = mul(load(from.value), splat(from.bf16_factor));
    codes = (__m512i)_mm512_cvtne2ps_pbh(scaled, scaled);
  }
};
inline VecI next_nibble16(VecI bits) { return _mm512_srli_epi16(bits, 4); }
inline VecPairs lookup_code(const PairCodeTable& table, VecI bits) {
  return (__m512bh)_mm512_permutexvar_epi16(bits, table.codes);
}

// Codes of a byte, and of the dynamic maps, by byte permutations (avx512vbmi).

// 64 values in order.
struct OrderedPairs {
  VecPairs first, second;
};
// The low and the high bytes of 128 magnitudes as bf16, which holds them exactly.
struct MagnitudeBytes {
  alignas(64) uint8_t low[128] = {};
  alignas(64) uint8_t high[128] = {};
  // The value 2^exponent * (1 + mantissa / 2^bits).
  constexpr void set(int at, int exponent, int mantissa, int bits) {
    const int all = (exponent + 127) << 7 | mantissa << (7 - bits);
    low[at] = static_cast<uint8_t>(all);
    high[at] = static_cast<uint8_t>(all >> 8);
  }
};
struct E4M3Magnitudes : MagnitudeBytes {
  constexpr E4M3Magnitudes() {
    for (int code = 1; code < 128; ++code) {
      // The exponent of E4M3 has the bias 7; subnormals are made normal.
      int exponent = code >> 3, mantissa = code & 7;
      if (exponent == 0) {
        for (exponent = 1; mantissa < 8; --exponent) mantissa *= 2;
        mantissa -= 8;
      }
      set(code, exponent - 7, mantissa, 3);
    }
  }
};
struct Int8Magnitudes : MagnitudeBytes {
  constexpr Int8Magnitudes() {
    for (int code = 1; code < 128; ++code) {
      int exponent = 0;
      while (code >> (exponent + 1)) ++exponent;
      set(code, exponent, code - (1 << exponent), exponent);
    }
  }
};
// Looks up the bytes by the low seven bits of each index.
class MagnitudeTable {
 public:
  explicit MagnitudeTable(const MagnitudeBytes& bytes) {
    for (int half = 0; half < 2; ++half) {
      low_[half] = _mm512_load_si512(bytes.low + 64 * half);
      high_[half] = _mm512_load_si512(bytes.high + 64 * half);
    }
  }
  __m512i low(__m512i index) const { return _mm512_permutex2var_epi8(low_[0], index, low_[1]); }
  // With the signs of `codes`.
  __m512i high(__m512i index, __m512i codes) const {
    constexpr int kOrAnd = 0xf8;  // a | (b & c)
    return _mm512_ternarylogic_epi32(_mm512_permutex2var_epi8(high_[0], index, high_[1]), codes,
                                     _mm512_set1_epi8(static_cast<char>(0x80)), kOrAnd);
  }

 private:
  __m512i low_[2], high_[2];
};
// Codes in the order in which pairs_of_bytes gives their values in order.
inline __m512i load_codes_by_lane(const uint8_t* codes) {
  return _mm512_permutexvar_epi64(_mm512_set_epi64(7, 3, 6, 2, 5, 1, 4, 0), _mm512_loadu_si512(codes));
}
inline OrderedPairs pairs_of_bytes(__m512i low, __m512i high) {
  // Unpacks within 128-bit lanes.
  return {(__m512bh)_mm512_unpacklo_epi8(low, high), (__m512bh)_mm512_unpackhi_epi8(low, high)};
}

class E4M3Values {
 public:
  E4M3Values() : table_(kBytes) {}
  OrderedPairs decode(const uint8_t* codes) const {
    const __m512i index = load_codes_by_lane(codes);
    return pairs_of_bytes(table_.low(index), table_.high(index, index));
  }

 private:
  static constexpr E4M3Magnitudes kBytes{};
  const MagnitudeTable table_;
};
class Int8Values {
 public:
  Int8Values() : table_(kBytes) {}
  OrderedPairs decode(const uint8_t* codes) const {
    const __m512i code = load_codes_by_lane(codes), index = _mm512_abs_epi8(code);
    // -128 is the only code whose magnitude has eight bits.
    const __mmask64 least = _mm512_movepi8_mask(index);
    const __m512i high = _mm512_mask_mov_epi8(table_.high(index, code), least,
                                              _mm512_set1_epi8(static_cast<char>(kHighOfLeast)));
    return pairs_of_bytes(table_.low(index), high);
  }

 private:
  static constexpr Int8Magnitudes kBytes{};
  static constexpr int kHighOfLeast = 0xc3;  // of -128 as bf16, whose low byte is 0
  const MagnitudeTable table_;
};

// Codes of a byte times a factor, decoded by E4M3Values or Int8Values.
template <class Values>
class ByteTable {
 public:
  OrderedPairs decode(const uint8_t* codes) const { return values_.decode(codes); }

  // 64 elements times `factor`, the even before the odd.
  void decode_even_odd(const uint8_t* codes, Vec factor, PanelBF16* out) const {
    const OrderedPairs values = decode(codes);
    store_pairs(out,
                round_two(mul(even_floats(values.first), factor), mul(even_floats(values.second), factor)));
    store_pairs(out + 32,
                round_two(mul(odd_floats(values.first), factor), mul(odd_floats(values.second), factor)));
  }
  // 64 columns of two rows with a factor each, interleaved.
  void decode_rows(const uint8_t* row0, Vec factor0, const uint8_t* row1, Vec factor1, PanelBF16* out) const {
    const OrderedPairs a = decode(row0), b = decode(row1);
    decode_half(a.first, factor0, b.first, factor1, out);
    decode_half(a.second, factor0, b.second, factor1, out + 64);
  }

 private:
  // The even and the odd elements as fp32.
  static Vec even_floats(VecPairs x) { return (Vec)_mm512_slli_epi32((__m512i)x, 16); }
  static Vec odd_floats(VecPairs x) {
    return (Vec)_mm512_and_si512((__m512i)x, _mm512_set1_epi32(static_cast<int>(0xffff0000)));
  }
  // All of a, then all of b.
  static VecPairs round_two(Vec a, Vec b) { return _mm512_cvtne2ps_pbh(b, a); }
  static void decode_half(VecPairs a, Vec factor0, VecPairs b, Vec factor1, PanelBF16* out) {
    const __m512i even =
        (__m512i)pair_lanes(mul(even_floats(a), factor0), mul(even_floats(b), factor1), PanelBF16{});
    const __m512i odd =
        (__m512i)pair_lanes(mul(odd_floats(a), factor0), mul(odd_floats(b), factor1), PanelBF16{});
    const __m512i first = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    const __m512i second = _mm512_add_epi32(first, _mm512_set1_epi32(8));
    _mm512_storeu_si512(out, _mm512_permutex2var_epi32(even, first, odd));
    _mm512_storeu_si512(out + 32, _mm512_permutex2var_epi32(even, second, odd));
  }

  const Values values_{};
};

// Byte kByte of each of 64 lanes.
template <int kByte>
inline __m512i one_byte_each(__m512i a, __m512i b, __m512i c, __m512i d) {
  alignas(64) static constexpr uint8_t kFrom[64] = {
#define PEFT_KERNELS_4(i) kByte + 4 * (i), kByte + 4 * (i) + 4, kByte + 4 * (i) + 8, kByte + 4 * (i) + 12
      PEFT_KERNELS_4(0),  PEFT_KERNELS_4(4),  PEFT_KERNELS_4(8),  PEFT_KERNELS_4(12),
      PEFT_KERNELS_4(16), PEFT_KERNELS_4(20), PEFT_KERNELS_4(24), PEFT_KERNELS_4(28)};
#undef PEFT_KERNELS_4
  const __m512i from = _mm512_load_si512(kFrom);
  const __m512i low = _mm512_permutex2var_epi8(a, from, b), high = _mm512_permutex2var_epi8(c, from, d);
  return _mm512_inserti64x4(low, _mm512_castsi512_si256(high), 1);
}

constexpr int kFoundTogether = 4;
// Looks at the lower half of each lane.
inline bool any_without(const VecN (&x)[4], int32_t bits) {
  const __m512i least = _mm512_min_epu16(_mm512_min_epu16((__m512i)x[0], (__m512i)x[1]),
                                         _mm512_min_epu16((__m512i)x[2], (__m512i)x[3]));
  return any_without((VecN)least, bits);
}
inline __m512i found_bytes(const VecN (&found)[4]) {
  return one_byte_each<2>((__m512i)found[0], (__m512i)found[1], (__m512i)found[2], (__m512i)found[3]);
}
inline void store_codes(uint8_t* out, const VecN (&found)[4]) {
  _mm512_storeu_si512(out, found_bytes(found));
}
inline void store_signed_codes(uint8_t* out, const VecN (&found)[4], const float* signs) {
  const __m512i bytes = found_bytes(found), zero = _mm512_set1_epi8(kSignedZero);
  const __mmask64 negative = _mm512_movepi8_mask(
      one_byte_each<3>((__m512i)load(signs), (__m512i)load(signs + kLanes), (__m512i)load(signs + 2 * kLanes),
                       (__m512i)load(signs + 3 * kLanes)));
  // Saturation turns 128 below zero into 127.
  _mm512_storeu_si512(out, _mm512_mask_subs_epu8(_mm512_add_epi8(zero, bytes), negative, zero, bytes));
}

// A table of 256 floats, stored as one plane per byte.
class Codebook {
 public:
  explicit Codebook(const float* values) {
    for (int i = 0; i < kCodes; i += kLanes) {
      const __m512i words = (__m512i)load(values + i);
      for (int plane = 0; plane < 4; ++plane) {
        const __m512i shifted = _mm512_srl_epi32(words, _mm_cvtsi32_si128(8 * plane));
        _mm_store_si128(reinterpret_cast<__m128i*>(planes_[plane] + i), _mm512_cvtepi32_epi8(shifted));
      }
    }
  }
  // out[i] = values[codes[i]] * scale, kCodeRun of them.
  void decode(const uint8_t* codes, Vec scale, float* out) const {
    // Unpacking interleaves bytes within 128-bit lanes, so the codes are arranged accordingly.
    const __m512i by_lane = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    const __m512i index = _mm512_permutexvar_epi32(by_lane, _mm512_loadu_si512(codes));
    const __mmask64 upper = _mm512_movepi8_mask(index);
    __m512i bytes[4];
    for (int plane = 0; plane < 4; ++plane) {
      const uint8_t* table = planes_[plane];
      bytes[plane] = _mm512_mask_mov_epi8(lookup128(table, index), upper, lookup128(table + 128, index));
    }
    const __m512i low0 = _mm512_unpacklo_epi8(bytes[0], bytes[1]),
                  low1 = _mm512_unpackhi_epi8(bytes[0], bytes[1]),
                  high0 = _mm512_unpacklo_epi8(bytes[2], bytes[3]),
                  high1 = _mm512_unpackhi_epi8(bytes[2], bytes[3]);
    store(out, mul((Vec)_mm512_unpacklo_epi16(low0, high0), scale));
    store(out + kLanes, mul((Vec)_mm512_unpackhi_epi16(low0, high0), scale));
    store(out + 2 * kLanes, mul((Vec)_mm512_unpacklo_epi16(low1, high1), scale));
    store(out + 3 * kLanes, mul((Vec)_mm512_unpackhi_epi16(low1, high1), scale));
  }

 private:
  static constexpr int kCodes = 256;
  // Uses the low seven bits of each index.
  static __m512i lookup128(const uint8_t* table, __m512i index) {
    return _mm512_permutex2var_epi8(_mm512_load_si512(table), index, _mm512_load_si512(table + 64));
  }
  alignas(64) uint8_t planes_[4][kCodes];
};
