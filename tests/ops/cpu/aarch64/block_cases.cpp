// The kernels between the GEMMs of a block, against ISA scalar.
#include "cases.h"

namespace peft_kernels::cpu::cases {

PEFT_KERNELS_CASE(rms_norm) {
  constexpr int64_t kRows = 3, kFeatures = 77;
  for (DType dtype : kTypes) {
    for (DType out_dtype : {dtype, DType::kF32}) {
      const Array x = normal(dtype, kRows * kFeatures, 1), dy = normal(out_dtype, kRows * kFeatures, 2);
      const Array weight = normal(DType::kF32, kFeatures, 3);
      const auto use = [&](const KernelTable& table) {
        Array out(out_dtype, kRows * kFeatures), rstd(DType::kF32, kRows), dx(dtype, kRows * kFeatures),
            sums(DType::kF32, kFeatures);
        const RmsNormParams params{x.data(),  dtype,     kFeatures,       weight.as<float>(),
                                   1e-5f,     out_dtype, out.data(),      rstd.as<float>(),
                                   dy.data(), dx.data(), sums.as<float>()};
        table.rms_norm(params, 0, kRows);
        table.rms_norm_backward(params, 0, kRows);
        return Arrays{out, rstd, dx, sums};
      };
      both(tested, use, like_scalar, name_of(dtype) + " to " + name_of(out_dtype));
      const auto add = [&](const KernelTable& table) {
        Array out(out_dtype, kRows * kFeatures), rstd(DType::kF32, kRows), sum(out_dtype, kRows * kFeatures);
        const Array residual = normal(out_dtype, kRows * kFeatures, 4);
        RmsNormParams params{};
        params.x = params.sum = sum.data();
        params.dtype = params.out_dtype = out_dtype;
        params.features = kFeatures;
        params.weight = weight.as<float>();
        params.eps = 1e-5f;
        params.out = out.data();
        params.rstd = rstd.as<float>();
        params.rounds = false;
        params.branch = x.data();
        params.branch_dtype = dtype;
        params.residual = residual.data();
        table.add_rms_norm(params, 0, kRows);
        return Arrays{out, rstd, sum};
      };
      both(tested, add, like_scalar, name_of(dtype) + " added to " + name_of(out_dtype));
    }
  }
}

PEFT_KERNELS_CASE(cast) {
  constexpr int64_t kElements = 203;
  for (DType dtype : kTypes) {
    const Array x = normal(dtype, kElements, 1);
    for (DType out_dtype : kTypes) {
      for (bool adds : {false, true}) {
        const Array residual = normal(out_dtype, kElements, 2);
        const auto use = [&](const KernelTable& table) {
          Array out(out_dtype, kElements);
          const CastParams params{x.data(),  dtype,      adds ? residual.data() : nullptr,
                                  out_dtype, out.data(), out_dtype};
          table.cast(params, 0, 96);
          table.cast(params, 96, kElements);
          return Arrays{out};
        };
        both(tested, use, same_bits, name_of(dtype) + (adds ? " added to " : " as ") + name_of(out_dtype));
      }
    }
  }
}

PEFT_KERNELS_CASE(rotary) {
  constexpr int64_t kSequences = 2, kRows = 3, kHeads = 2, kFeatures = 22;
  constexpr int64_t kTokens = kSequences * kRows, kAll = kTokens * kHeads * kFeatures;
  const Array cos = normal(DType::kF32, kRows * kFeatures, 1),
              sin = normal(DType::kF32, kRows * kFeatures, 2);
  for (DType dtype : kTypes) {
    const Array x = normal(dtype, kAll, 3);
    for (bool rounds : {false, true}) {
      for (bool inverse : {false, true}) {
        const auto use = [&](const KernelTable& table) {
          Array out(dtype, kAll);
          const RotaryParams params{x.data(),
                                    dtype,
                                    kRows * kHeads * kFeatures,
                                    kHeads * kFeatures,
                                    kFeatures,
                                    kRows,
                                    kHeads,
                                    kFeatures,
                                    cos.as<float>(),
                                    sin.as<float>(),
                                    0,
                                    rounds,
                                    inverse,
                                    out.data(),
                                    dtype};
          table.rotary(params, 0, 2);
          table.rotary(params, 2, kTokens);
          return Arrays{out};
        };
        both(tested, use, same_bits, name_of(dtype));
      }
    }
  }
}

}  // namespace peft_kernels::cpu::cases
