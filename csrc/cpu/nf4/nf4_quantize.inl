// Values to NF4 codes. Blocks start at even elements (a blocksize is a multiple of 32), so no byte is shared.

// The sorted thresholds as a binary search tree: level d holds the 2^d thresholds compared at depth d, few
// enough for one permutation.
struct ThresholdTree {
  alignas(32) float level2[8];
  alignas(32) float level3[8];
  alignas(32) float level4[8];
};
constexpr const float* kT = nf4::kThresholds;
constexpr ThresholdTree kTree = {{kT[3], kT[11]},
                                 {kT[1], kT[5], kT[9], kT[13]},
                                 {kT[0], kT[2], kT[4], kT[6], kT[8], kT[10], kT[12], kT[14]}};

// How many thresholds t satisfy x > t; 0 for NaN.
inline VecI code_of(Vec x) {
  VecI index = double_plus_greater(zero_bits(), x, splat(kT[7]));
  index = double_plus_greater(index, x, lookup8(kTree.level2, index));
  index = double_plus_greater(index, x, lookup8(kTree.level3, index));
  return double_plus_greater(index, x, lookup8(kTree.level4, index));
}

template <class T>
float block_max(const T* x, int64_t count) {
  VecI bits = zero_bits();
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) bits = max_abs_bits(bits, load(x + i));
  if (i < count) bits = max_abs_bits(bits, load_part(x + i, count - i));
  return as_float(reduce_max(bits));
}

template <class T>
void quantize_block(const T* x, int64_t count, uint8_t* packed, float* absmax_out) {
  const float absmax = block_max(x, count);
  *absmax_out = absmax;
  const Vec scale = splat(inverse_of(absmax));  // 0 gives every value the code of 0.0
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store_nibbles(packed + (i >> 1), code_of(mul(load(x + i), scale)));
  if (i < count) {
    // Lanes past the end are 0.0, whose code is the padding nibble.
    uint8_t tail[kLanes / 2];
    store_nibbles(tail, code_of(mul(load_part(x + i, count - i), scale)));
    memcpy(packed + (i >> 1), tail, (count - i + 1) >> 1);
  }
}

template <class T>
void quantize_blocks(const QuantizeParams& p, int64_t block_begin, int64_t block_end) {
  const int64_t blocksize = int64_t{1} << p.block_shift;
  for (int64_t block = block_begin; block < block_end; ++block) {
    const int64_t first = block << p.block_shift;
    const int64_t count = p.n - first < blocksize ? p.n - first : blocksize;
    quantize_block(static_cast<const T*>(p.weight) + first, count, p.packed + (first >> 1), p.absmax + block);
  }
}

void quantize(const QuantizeParams& p, int64_t block_begin, int64_t block_end) {
  with_type(p.dtype, [&](auto type) { quantize_blocks<decltype(type)>(p, block_begin, block_end); });
}
