// NF4 codes to values. A run of elements may start in either nibble and cross any number of blocks and rows.

inline float block_absmax(const Nf4View& w, int64_t block) {
  if (w.absmax) return w.absmax[block];
  // Multiply, round, add, round: bit-equal to bitsandbytes, so no fused multiply-add (-ffp-contract=off).
  return nf4::kDynamicMap[w.q8[block]] * w.absmax2[block >> nf4::kAbsmaxBlockShift] + w.offset;
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

template <class Out>
void dequantize_run(const Nf4View& w, int64_t first, int64_t count, Out* out) {
  constexpr int64_t kStep = NibbleTable<Out>::kStep;
  const int64_t blocksize = int64_t{1} << w.block_shift;
  while (count > 0) {
    const int64_t left_in_block = blocksize - (first & (blocksize - 1));
    const NibbleTable<Out> table(block_absmax(w, first >> w.block_shift));
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
