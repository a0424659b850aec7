// Quantising and dequantising, bit for bit.
#include <cmath>
#include <limits>

#include "cases.h"

namespace peft_kernels::cpu::cases {

static void quantise(const KernelTable& tested, const Array& x, int block_shift, const std::string& what) {
  const int64_t n = x.size(), blocks = (n + (int64_t{1} << block_shift) - 1) >> block_shift;
  const auto run = [&](const KernelTable& table, Array& packed, Array& absmax) {
    const QuantizeParams params{x.data(),          x.dtype(), n, block_shift, packed.as<uint8_t>(),
                                absmax.as<float>()};
    table.quantize(params, 0, blocks / 2);
    table.quantize(params, blocks / 2, blocks);
  };
  Array packed = Array::bytes((n + 1) / 2), absmax(DType::kF32, blocks);
  Array want_packed = packed, want_absmax = absmax;
  run(tested, packed, absmax);
  run(scalar::kKernels, want_packed, want_absmax);
  same_bits(packed, want_packed, what + ": codes");
  same_bits(absmax, want_absmax, what + ": absmax");
}

PEFT_KERNELS_CASE(quantize) {
  for (DType dtype : kTypes) {
    for (int64_t n : {1, 31, 64, 301, 4096}) {
      for (int shift : {5, 6, 12}) {
        quantise(tested, normal(dtype, n, n + shift), shift, name_of(dtype) + " n" + std::to_string(n));
      }
    }
  }
}

PEFT_KERNELS_CASE(quantize_ties) {
  // Every threshold and its neighbours in a block with absmax 1; then special values.
  const float infinity = std::numeric_limits<float>::infinity();
  Array x(DType::kF32, 128);
  for (int64_t i = 0; i < x.size(); ++i) x.set(i, 1.0);
  for (int t = 0; t < nf4::kCodes - 1; ++t) {
    const float threshold = nf4::kThresholds[t];
    for (int side = -1; side <= 1; ++side) {
      const float near = side == 0 ? threshold : std::nextafterf(threshold, side * infinity);
      x.set(3 * t + side + 1, near);
    }
  }
  quantise(tested, x, 6, "ties");
  for (double odd : {0.0, -0.0, 1e-45, 1e-39, 3e38, double{infinity}, std::nan("")}) {
    for (DType dtype : kTypes) {
      Array all(dtype, 64), one(dtype, 70);
      for (int64_t i = 0; i < all.size(); ++i) all.set(i, odd);
      for (int64_t i = 0; i < one.size(); ++i) one.set(i, i == 5 ? odd : 0.01 * static_cast<double>(i));
      quantise(tested, all, 6, "all " + std::to_string(odd) + " in " + name_of(dtype));
      quantise(tested, one, 6, "one " + std::to_string(odd) + " in " + name_of(dtype));
    }
  }
}

PEFT_KERNELS_CASE(quantize_absmax) {
  for (int64_t blocks : {1, 255, 700}) {
    Array absmax = normal(DType::kF32, blocks, 1);
    if (blocks > 300) absmax.set(270, std::nan(""));
    const int64_t groups = (blocks + 255) / 256;
    const auto use = [&](const KernelTable& table) {
      Array q8 = Array::bytes(blocks), absmax2(DType::kF32, groups);
      table.quantize_absmax({absmax.as<float>(), blocks, 0.1f, q8.as<uint8_t>(), absmax2.as<float>()}, 0,
                            groups);
      return Arrays{q8, absmax2};
    };
    both(tested, use, same_bits, "of " + std::to_string(blocks));
  }
}

PEFT_KERNELS_CASE(dequantize) {
  for (Form form : kForms) {
    for (int shift : {4, 5, 6, 8}) {
      if (shift == 4 && form != Form::kByTable) continue;
      const Weight weight(2001, shift, form, shift);
      for (DType dtype : kTypes) {
        for (int64_t begin : {0, 1, 16, 63, 512}) {
          for (int64_t end : {int64_t{513}, int64_t{1024}, weight.size}) {
            Array out(dtype, end), want(dtype, end);
            tested.dequantize(weight.view, begin, end, dtype, out.data());
            for (int64_t i = begin; i < end; ++i) want.set(i, weight.at(i));
            same_bits(out, want, name_of(form) + " " + name_of(dtype) + " from " + std::to_string(begin));
          }
        }
      }
    }
  }
}

}  // namespace peft_kernels::cpu::cases
