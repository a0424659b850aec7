// Codes to values. A run of elements may start in either nibble and cross any number of blocks and rows.

inline float block_absmax(const Nf4View& w, int64_t block) {
  if (w.absmax) return w.absmax[block];
  if (w.half_scales) {
    const uint16_t bits = w.half_scales[block];
    return w.has_bf16_scales ? float_of_bits(uint32_t{bits} << 16) : float_of_half(bits);
  }
  const float value = w.scale_values[w.q8[block]];
  if (!w.absmax2) return value;
  // Multiply, round, add, round: bit-equal to bitsandbytes, so no fused multiply-add (-ffp-contract=off).
  return value * w.absmax2[block >> nf4::kAbsmaxBlockShift] + w.offset;
}

// The scales of blocks [first, first + count), which are 16-bit floats.
inline void widen_scales(const Nf4View& w, int64_t first, int64_t count, float factor, float* out) {
  const DType dtype = w.has_bf16_scales ? DType::kBF16 : DType::kF16;
  widen_run(w.half_scales, dtype, first, count, factor, out);
}

inline const CodeValues& block_codes(const Nf4View& w, int64_t block) {
  return w.zero_points ? w.codes[w.zero_points[block] % kZeroPoints] : *w.codes;
}

// The scales of blocks [first, first + count), which are codes. Writes up to kCodeRun values past the end of
// `out`.
inline void unpack_scales(const Codebook& book, const Nf4View& w, int64_t first, int64_t count, float* out) {
  const Vec offset = splat(w.offset);
  for (int64_t b = first, end = first + count; b < end;) {
    const int64_t group = b >> nf4::kAbsmaxBlockShift;
    const int64_t run = min64(min64(kCodeRun, end - b), ((group + 1) << nf4::kAbsmaxBlockShift) - b);
    const uint8_t* codes = w.q8 + b;
    uint8_t copy[kCodeRun];  // the weight may end here
    if (run < kCodeRun) {
      memset(copy, 0, sizeof(copy));
      memcpy(copy, codes, run);
      codes = copy;
    }
    book.decode(codes, splat(w.absmax2 ? w.absmax2[group] : 1.0f), out);
    for (int64_t i = 0; w.absmax2 && i < run; i += kLanes) store(out + i, add(load(out + i), offset));
    b += run;
    out += run;
  }
}

// E4M3 as fp16, which is 2^-8 times its value: sign, exponent and mantissa are moved as they are, so that
// subnormals stay what they are. NaN, which no weight has, becomes 1.875.
inline uint16_t half_of_e4m3(uint32_t code) {
  return static_cast<uint16_t>((code & 0x7f) << 7 | (code & 0x80) << 8);
}

// How codes of a byte are decoded: value(code) times kFactor, or as pairs of bf16, which hold them exactly.
struct E4M3Codes {
  using Value = F16;
  static constexpr float kFactor = 256.0f;
  static F16 value(uint8_t code) { return {half_of_e4m3(code)}; }
#if PEFT_KERNELS_PERMUTES_BYTES
  using Pairs = ByteTable<E4M3Values>;
#endif
};
struct Int8Codes {
  using Value = float;
  static constexpr float kFactor = 1.0f;
  static float value(uint8_t code) { return static_cast<int8_t>(code); }
#if PEFT_KERNELS_PERMUTES_BYTES
  using Pairs = ByteTable<Int8Values>;
#endif
};
template <class Use>
void with_byte_codes(const Nf4View& w, const Use& use) {
  w.has_int8 ? use(Int8Codes{}) : use(E4M3Codes{});
}

template <class Codes, class Out>
void decode_bytes(const uint8_t* codes, int64_t count, float scale, Out* out) {
  constexpr int64_t kStep = 64;
  const Vec factor = splat(scale * Codes::kFactor);
  for (; count > 0; count -= kStep, codes += kStep, out += kStep) {
    uint8_t copy[kStep] = {};
    typename Codes::Value values[kStep];
    const bool is_whole = count >= kStep;
    if (!is_whole) memcpy(copy, codes, count);
    const uint8_t* from = is_whole ? codes : copy;
    for (int64_t i = 0; i < kStep; ++i) values[i] = Codes::value(from[i]);
    for_lanes(0, min64(kStep, count),
              [&](int64_t i, int64_t lanes) { store_lanes(out + i, mul(load(values + i), factor), lanes); });
  }
}

// Calls use(begin, end, scale) for the parts of elements [first, first + count), bytes, that share a scale.
template <class Use>
void for_byte_blocks(const Nf4View& w, int64_t first, int64_t count, const Use& use) {
  int64_t row = first / w.cols, col = first % w.cols;
  for (int64_t at = 0; at < count;) {
    const int64_t block = col >> w.block_shift;
    const int64_t end_col = w.block_shift == kWholeRowShift ? w.cols : (block + 1) << w.block_shift;
    const int64_t end = min64(count, at + min64(end_col, w.cols) - col);
    use(at, end, w.absmax[(row >> w.row_shift) * w.blocks_in_row + block]);
    col += end - at;
    if (col == w.cols) ++row, col = 0;
    at = end;
  }
}

// A run within one block, from any element.
template <class Out>
void decode_ragged_run(const NibbleTable<Out>& table, const uint8_t* packed, int64_t first, int64_t count,
                       Out* out) {
  constexpr int kStep = NibbleTable<Out>::kStep;
  const uint8_t* bytes = packed + (first >> 1);
  if (first & 1) {  // starts in a low nibble
    uint8_t step_bytes[kStep / 2] = {*bytes++};
    Out step[kStep];
    table.decode(step_bytes, step);
    *out++ = step[1];
    --count;
  }
  for (; count >= kStep; count -= kStep, bytes += kStep / 2, out += kStep) table.decode(bytes, out);
  if (count > 0) {  // a copy, so that neither side is accessed past its end
    uint8_t step_bytes[kStep / 2] = {};
    Out step[kStep];
    memcpy(step_bytes, bytes, (count + 1) >> 1);
    table.decode(step_bytes, step);
    memcpy(out, step, count * sizeof(Out));
  }
}

// Whole blocks of kSmallestBlocksize, which is less than a step of NibbleTable<Out>, through fp32.
template <class Out>
void decode_short_blocks(const Nf4View& w, int64_t first, int64_t count, Out* out) {
  constexpr int64_t kBlock = kSmallestBlocksize;
  for (; count > 0; first += kBlock, out += kBlock, count -= kBlock) {
    const int64_t block = first >> w.block_shift;
    const NibbleTable<float> table(block_codes(w, block), block_absmax(w, block));
    float values[kBlock];
    for (int64_t i = 0; i < kBlock; i += NibbleTable<float>::kStep) {
      table.decode(w.packed + (first + i) / 2, values + i);
    }
    narrow_run(values, kBlock, out);
  }
}

template <class Out>
void dequantize_run(const Nf4View& w, int64_t first, int64_t count, Out* out) {
  if (!w.codes) {
    return with_byte_codes(w, [&](auto codes) {
      for_byte_blocks(w, first, count, [&](int64_t begin, int64_t end, float scale) {
        decode_bytes<decltype(codes)>(w.packed + first + begin, end - begin, scale, out + begin);
      });
    });
  }
  constexpr int64_t kStep = NibbleTable<Out>::kStep;
  const int64_t blocksize = int64_t{1} << w.block_shift;
  if constexpr (kStep > kSmallestBlocksize) {
    if (blocksize == kSmallestBlocksize && first % blocksize == 0) {
      const int64_t whole = count - count % blocksize;
      decode_short_blocks(w, first, whole, out);
      first += whole;
      out += whole;
      count -= whole;
    }
  }
  while (count > 0) {
    const int64_t left_in_block = blocksize - (first & (blocksize - 1));
    const int64_t block = first >> w.block_shift;
    const NibbleTable<Out> table(block_codes(w, block), block_absmax(w, block));
    int64_t run = count < left_in_block ? count : left_in_block;
    if (first % kStep == 0 && run >= kStep) {
      run -= run % kStep;
      const uint8_t* bytes = w.packed + first / 2;
      for (int64_t i = 0; i < run; i += kStep) table.decode(bytes + i / 2, out + i);
    } else {
      decode_ragged_run(table, w.packed, first, run, out);
    }
    first += run;
    out += run;
    count -= run;
  }
}

// Elements [begin, end) of the flat weight, to out[begin] onwards.
void dequantize(const Nf4View& w, int64_t begin, int64_t end, DType dtype, void* out) {
  with_type(dtype, [&](auto type) {
    dequantize_run(w, begin, end - begin, static_cast<decltype(type)*>(out) + begin);
  });
}
