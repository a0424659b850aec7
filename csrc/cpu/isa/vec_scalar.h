// Portable vectors: four fp32 lanes in plain C++, compiled to the machine's baseline instructions. Same
// interface as vec_avx512.h, which documents it. The other ISAs are tested against this one.

typedef float Vec __attribute__((vector_size(16)));
typedef int32_t VecI __attribute__((vector_size(16)));
constexpr int kLanes = 4;
constexpr int kRegisters = 16;
// Below this many multiply-adds, waking a second thread costs more than it saves.
constexpr int64_t kMultiplyAddsPerThread = 100'000;
constexpr int kDotRows = 2;
constexpr int kOuterRows = 4;
constexpr int kOuterVecs = 2;

inline Vec zero() { return Vec{}; }
inline Vec splat(float x) { return Vec{x, x, x, x}; }
inline Vec add(Vec a, Vec b) { return a + b; }
inline Vec mul(Vec a, Vec b) { return a * b; }
inline Vec fma(Vec a, Vec b, Vec c) { return a * b + c; }
inline Vec sub(Vec a, Vec b) { return a - b; }
inline Vec div(Vec a, Vec b) { return a / b; }
inline Vec min(Vec a, Vec x) { return a < x ? a : x; }
inline Vec max(Vec a, Vec x) { return a > x ? a : x; }
inline Vec by_sign(Vec x, Vec negative, Vec positive) { return (VecI)x < 0 ? negative : positive; }
inline Vec where_zero(Vec x, Vec value, Vec other) { return x == zero() ? value : other; }
inline Vec low_bits_to_exponent(Vec x) { return (Vec)((VecI)x << 23); }

inline float widen1(float x) { return x; }
inline float widen1(BF16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  float out;
  memcpy(&out, &bits, sizeof(out));
  return out;
}
inline float widen1(F16 x) {
  const uint32_t sign = uint32_t(x.bits & 0x8000) << 16;
  const uint32_t magnitude = x.bits & 0x7fff;
  float out;
  if (magnitude < 0x0400) {  // zero and subnormal: an integer count of 2^-24
    out = static_cast<float>(magnitude) * 0x1p-24f;
  } else {
    // Rebias the exponent from 15 to 127; Inf and NaN take the largest exponent.
    uint32_t bits = (magnitude << 13) + (magnitude >= 0x7c00 ? (255u - 31u) << 23 : (127u - 15u) << 23);
    if (magnitude > 0x7c00) bits |= 0x00400000;  // quiet, as F16C makes it
    memcpy(&out, &bits, sizeof(out));
  }
  uint32_t bits;
  memcpy(&bits, &out, sizeof(bits));
  bits |= sign;
  memcpy(&out, &bits, sizeof(out));
  return out;
}

inline float float_of_half(uint16_t bits) { return widen1(F16{bits}); }

inline void narrow1(float x, float* out) { *out = x; }
// Round to nearest even; a NaN becomes the quiet NaN 0x7fc0, as in torch.
inline void narrow1(float x, BF16* out) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  out->bits = x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void narrow1(float x, F16* out) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  const uint16_t sign = (bits >> 16) & 0x8000;
  bits &= 0x7fffffff;
  uint32_t half;
  if (bits > 0x7f800000) {
    half = 0x7e00 | ((bits >> 13) & 0x03ff);
  } else if (bits >= 0x477ff000) {  // 65520 and above round to Inf
    half = 0x7c00;
  } else if (bits < 0x38800000) {  // below 2^-14: adding 0.5 leaves a count of 2^-24 in the low bits, rounded
    float magnitude;
    memcpy(&magnitude, &bits, sizeof(magnitude));
    magnitude += 0.5f;
    memcpy(&half, &magnitude, sizeof(half));
    half -= 0x3f000000;
  } else {
    half = (bits + 0xfff + ((bits >> 13) & 1) - ((127u - 15u) << 23)) >> 13;
  }
  out->bits = static_cast<uint16_t>(half | sign);
}

inline Vec load(const float* p) {
  Vec out;
  memcpy(&out, p, sizeof(out));
  return out;
}
template <class Half>
inline Vec load(const Half* p) {
  return Vec{widen1(p[0]), widen1(p[1]), widen1(p[2]), widen1(p[3])};
}

template <class T>
inline Vec load_part(const T* p, int64_t count) {
  Vec out{};
  for (int64_t i = 0; i < count; ++i) out[i] = widen1(p[i]);
  return out;
}

template <class T>
inline void store_part(T* p, Vec x, int64_t count) {
  for (int64_t i = 0; i < count; ++i) narrow1(x[i], p + i);
}
template <class T>
inline void store(T* p, Vec x) {
  store_part(p, x, kLanes);
}
inline void store(float* p, Vec x) { memcpy(p, &x, sizeof(x)); }

typedef uint64_t VecW __attribute__((vector_size(16)));
inline VecW count_from(uint64_t first) { return VecW{first, first + 1}; }
inline VecW splat_word(uint32_t x) { return VecW{x, x}; }
inline VecW multiply_low(VecW a, VecW b) { return (a & 0xffffffff) * (b & 0xffffffff); }
inline VecW high_half(VecW a) { return a >> 32; }
inline VecW xor3(VecW a, VecW b, VecW c) { return a ^ b ^ c; }
inline void store_blocks(uint32_t* out, VecW w0, VecW w1, VecW w2, VecW w3) {
  for (int i = 0; i < 2; ++i) {
    *out++ = static_cast<uint32_t>(w0[i]);
    *out++ = static_cast<uint32_t>(w1[i]);
    *out++ = static_cast<uint32_t>(w2[i]);
    *out++ = static_cast<uint32_t>(w3[i]);
  }
}
inline Vec keep_factors(const uint32_t* words, uint32_t threshold, float scale) {
  Vec out;
  for (int i = 0; i < kLanes; ++i) out[i] = words[i] >= threshold ? scale : 0.0f;
  return out;
}

inline void add_lane_sums(Vec a, Vec b, Vec c, Vec d, float* out) {
  out[0] += (a[0] + a[2]) + (a[1] + a[3]);
  out[1] += (b[0] + b[2]) + (b[1] + b[3]);
  out[2] += (c[0] + c[2]) + (c[1] + c[3]);
  out[3] += (d[0] + d[2]) + (d[1] + d[3]);
}

inline VecI zero_bits() { return VecI{}; }
inline VecI max_bits(VecI a, Vec x) { return a > (VecI)x ? a : (VecI)x; }
inline VecI max_abs_bits(VecI a, Vec x) { return max_bits(a, (Vec)((VecI)x & 0x7fffffff)); }
inline int32_t reduce_max(VecI a) {
  const int32_t x = a[0] > a[1] ? a[0] : a[1], y = a[2] > a[3] ? a[2] : a[3];
  return x > y ? x : y;
}
inline VecI double_plus_greater(VecI index, Vec a, Vec b) { return index + index - (a > b); }
inline Vec lookup8(const float* table, VecI index) {
  return Vec{table[index[0]], table[index[1]], table[index[2]], table[index[3]]};
}
inline void store_nibbles(uint8_t* p, VecI codes) {
  p[0] = static_cast<uint8_t>(codes[0] << 4 | codes[1]);
  p[1] = static_cast<uint8_t>(codes[2] << 4 | codes[3]);
}

struct CodeTable {
  const float* codes;
  explicit CodeTable(const CodeValues& from) : codes(from.value) {}
};
inline VecI load_bytes(const uint8_t* p) {
  VecI out;
  for (int i = 0; i < kLanes; ++i, p += 4) {  // little-endian on every machine
    out[i] = static_cast<int32_t>(p[0] | p[1] << 8 | p[2] << 16 | uint32_t{p[3]} << 24);
  }
  return out;
}
inline VecI next_nibble(VecI bits) { return bits >> 4; }
inline Vec lookup_code(const CodeTable& table, VecI bits) {
  const float* codes = table.codes;
  return Vec{codes[bits[0] & 15], codes[bits[1] & 15], codes[bits[2] & 15], codes[bits[3] & 15]};
}
template <int kBlocks>
inline Vec spread_scales(const float* scales) {
  static_assert(kBlocks <= 2, "");
  return kBlocks == 1 ? splat(scales[0]) : Vec{scales[0], scales[0], scales[1], scales[1]};
}

template <class Out>
struct NibbleTable {
  static constexpr int kStep = 4;
  Out values[nf4::kCodes];
  NibbleTable(const CodeValues& codes, float scale) {
    for (int i = 0; i < nf4::kCodes; i += kLanes) store(values + i, mul(load(codes.value + i), splat(scale)));
  }
  void decode(const uint8_t* packed, Out* out) const {
    for (int i = 0; i < kStep / 2; ++i) {
      out[2 * i] = values[packed[i] >> 4];
      out[2 * i + 1] = values[packed[i] & 15];
    }
  }
  void decode_split(const uint8_t* packed, Out* even, Out* odd) const {
    for (int i = 0; i < kLanes; ++i) {
      even[i] = values[packed[i] >> 4];
      odd[i] = values[packed[i] & 15];
    }
  }
};

inline void transpose(Vec (&rows)[kLanes]) {
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < i; ++j) {
      const float x = rows[i][j];
      rows[i][j] = rows[j][i];
      rows[j][i] = x;
    }
  }
}

typedef VecI VecN;

inline Vec square_root(Vec x) {
  return Vec{__builtin_sqrtf(x[0]), __builtin_sqrtf(x[1]), __builtin_sqrtf(x[2]), __builtin_sqrtf(x[3])};
}
inline Vec gather(const float* table, VecN index) { return lookup8(table, index); }
inline void store_low_bytes(uint8_t* p, VecN x) {
  for (int i = 0; i < kLanes; ++i) p[i] = static_cast<uint8_t>(x[i]);
}
inline bool any_without(VecN x, int32_t bits) {
  const VecN zeros = (x & bits) == 0;
  return (zeros[0] | zeros[1] | zeros[2] | zeros[3]) != 0;
}

class SearchTables {
 public:
  explicit SearchTables(const CodeSearch& search) : search_(search) {}
  VecN passed(Vec x) const {
    VecN found{};
    for (float threshold : search_.thresholds) found -= x > threshold;
    return found;
  }
  static VecN in_exponent(VecN passed) { return passed << 23; }
  Vec slope(VecN passed) const { return gather(search_.slope, passed); }

 private:
  const CodeSearch& search_;
};
