// A step of AdamW, Adam or Lion, as in peft_kernels/ops/optim, in one pass over all parameters.
//
// Moment blocks, 256 elements each, are numbered through all parameters, and each thread block has a run of
// them: it looks up its first parameter once, and computes what depends on step and lr once per parameter. A
// warp processes one moment block at a time, so its absmax is one reduction; a lane has eight elements in two
// runs of four, which gives coalesced loads of all types.
#pragma once

#include <cfloat>

#include "../core/philox.cuh"
#include "adamw_elements.cuh"
#include "dynamic_codes.cuh"

namespace peft_kernels::cuda {

DEVICE bool is_finite(float x) { return (bit_cast<uint32_t>(x) & 0x7fffffff) < 0x7f800000; }

// NaN if either is NaN.
DEVICE float max_or_nan(float a, float b) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}

// 1 / x of an absmax; 0 if that overflows.
DEVICE float usable_reciprocal(float x) {
  const float found = rounded_reciprocal(x);
  return found <= FLT_MAX ? found : 0.0f;
}

// The coefficients of the update, shared by a parameter's elements.
struct StepCoefficients {
  float b1, w1, b2, w2, rate, floor, decay, weight_decay, lr;
};

// base^n in fp64, n >= 0.
DEVICE double power(double base, int64_t n) {
  double result = 1;
  for (; n > 0; n >>= 1) {
    if (n & 1) result = result * base;
    base = base * base;
  }
  return result;
}

template <bool kLion>
struct AdamWStep {
  static constexpr int kThreads = kStepThreads;
  static constexpr int kBlocksPerSm = 2;

  struct Params {
    Step step;
    Shares shares;
    const float* factor;  // or null: 1 / grad_scale
  };
  struct Shared {
    DynamicCodes<true> codes1;
    std::conditional_t<kLion, Words4, DynamicCodes<false> > codes2;
    StepCoefficients coefficients;
  };

  static DEVICE void run(const Params& params) {
    const Step& p = params.step;
    if (p.found_inf && load_constant(p.found_inf) != 0.0f) return;
    Shared* shared = shared_memory<Shared>();
    shared->codes1.template fill<kThreads>();
    if constexpr (!kLion) shared->codes2.template fill<kThreads>();
    float factor = 1.0f;
    if (params.factor) {
      factor = load_constant(params.factor);
    } else if (p.grad_scale) {
      factor = rounded_reciprocal(load_constant(p.grad_scale));
    }
    for_each_tensor(p, params.shares, [&](int i, int begin, int end) {
      const StepTensor& t = p.tensors[i];
      const int64_t step = load_constant(p.step + t.index);
      __syncthreads();  // the tables are filled, and the previous coefficients were read
      if (warp_index() == 0) compute_coefficients(p, t, step, shared->coefficients);
      __syncthreads();
      const StepCoefficients n = shared->coefficients;
      const StepTensor kept = t;
      const Work work{kept, p.grads[i], p.seed, factor, static_cast<uint32_t>(step)};
      if (t.dtype == DType::kF32) {
        all_blocks<float, false>(*shared, work, n, begin, end);
      } else if (t.dtype == DType::kF16) {
        all_blocks<fp16, false>(*shared, work, n, begin, end);
      } else if (t.compensation || p.seed) {
        // Registers are short here: fields of the table are read each time.
        all_blocks<bf16, true>(*shared, {t, work.grad, work.seed, factor, work.step}, n, begin, end);
      } else {
        all_blocks<bf16, false>(*shared, work, n, begin, end);
      }
    });
  }

 private:
  // Called by one warp; lanes 0 and 1 compute one power each.
  static DEVICE void compute_coefficients(const Step& p, const StepTensor& t, int64_t step,
                                          StepCoefficients& out) {
    const StepGroup& group = p.groups[t.group];
    const double beta1 = group.beta1, beta2 = group.beta2;
    const float lr = load_constant(p.lr + t.group);
    float correction = 1.0f;
    if constexpr (!kLion) correction = static_cast<float>(1 - power(lane_index() == 0 ? beta1 : beta2, step));
    const float c1 = __shfl_sync(kAllLanes, correction, 0), c2 = root(__shfl_sync(kAllLanes, correction, 1));
    if (lane_index() != 0) return;
    const bool decoupled = !p.decay_into_gradient;
    out.b1 = static_cast<float>(beta1);
    out.w1 = static_cast<float>(1 - beta1);
    out.b2 = static_cast<float>(beta2);
    out.w2 = static_cast<float>(1 - beta2);
    out.rate = -quotient(__fmul_rn(lr, c2), c1);
    out.floor = static_cast<float>(group.eps * c2);
    out.decay = decoupled ? static_cast<float>(1 - __dmul_rn(lr, group.weight_decay)) : 1.0f;
    out.weight_decay = decoupled ? 0.0f : static_cast<float>(group.weight_decay);
    out.lr = lr;
  }
  static DEVICE float root(float x) {
    float r;
    asm("sqrt.approx.f32 %0, %1;" : "=f"(r) : "f"(x));
    return r;
  }
  static DEVICE float quotient(float a, float b) {
    float r;
    asm("div.approx.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
  }

  // A parameter and its inputs of the step.
  struct Work {
    const StepTensor& t;
    const void* grad;
    const int64_t* seed;
    float factor;
    uint32_t step;
  };

  // Dispatches on types before the loop. kCare: rounding to bf16 is stochastic or compensated.
  template <class T, bool kCare>
  static DEVICE void all_blocks(const Shared& shared, const Work& w, const StepCoefficients& n, int begin,
                                int end) {
    w.t.absmax1 ? all_blocks<T, kCare, true>(shared, w, n, begin, end)
                : all_blocks<T, kCare, false>(shared, w, n, begin, end);
  }
  template <class T, bool kCare, bool kIs8bit>
  static DEVICE void all_blocks(const Shared& shared, const Work& w, const StepCoefficients& n, int begin,
                                int end) {
    const bool has_vectors = w.t.has_vectors && is_aligned(w.grad);
    for (int block = begin + warp_index(); block < end; block += kStepWarps) {
      one_block<T, kCare, kIs8bit>(shared, w, n, block, place(block, w.t.numel, has_vectors));
    }
  }

  // A lane's inputs of a block, all loaded together.
  template <class T, bool kCare, bool kIs8bit>
  struct Read {
    Raw p, g, m, v, compensation;

    template <bool kWhole>
    DEVICE void load_from(const Work& w, const Place& at) {
      using State = std::conditional_t<kIs8bit, uint8_t, uint32_t>;
      load_runs<Bits<T>, kWhole>(w.t.param, at, p);
      load_runs<Bits<T>, kWhole>(w.grad, at, g);
      load_runs<State, kWhole>(w.t.state1, at, m);
      if constexpr (!kLion) load_runs<State, kWhole>(w.t.state2, at, v);
      if (kCare && w.t.compensation) load_runs<uint16_t, kWhole>(w.t.compensation, at, compensation);
    }
  };
  // A lane's outputs of a block.
  template <class T, bool kCare, bool kIs8bit>
  struct Written {
    Raw p, m, v, compensation;

    template <bool kWhole>
    DEVICE void store_to(const Work& w, const Place& at) const {
      using State = std::conditional_t<kIs8bit, uint8_t, uint32_t>;
      store_runs<Bits<T>, kWhole>(w.t.param, at, p);
      store_runs<State, kWhole>(w.t.state1, at, m);
      if constexpr (!kLion) store_runs<State, kWhole>(w.t.state2, at, v);
      if (kCare && w.t.compensation) store_runs<uint16_t, kWhole>(w.t.compensation, at, compensation);
    }
  };

  template <class T, bool kCare, bool kIs8bit>
  static DEVICE void one_block(const Shared& shared, const Work& w, const StepCoefficients& n, int block,
                               const Place& at) {
    Read<T, kCare, kIs8bit> read;
    Written<T, kCare, kIs8bit> written;
    at.whole ? read.template load_from<true>(w, at) : read.template load_from<false>(w, at);
    float* const absmax1 = assume_global(w.t.absmax1 + block);
    float* const absmax2 = assume_global(w.t.absmax2 + block);

    float x[kMine], g[kMine], m[kMine], v[kMine] = {};
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      x[i] = value_of<T>(read.p, i);
      g[i] = __fmul_rn(value_of<T>(read.g, i), w.factor);
    }
    if constexpr (kIs8bit) {
      shared.codes1.decode(read.m, load(absmax1), m);
      if constexpr (!kLion) shared.codes2.decode(read.v, load(absmax2), v);
    } else {
#pragma unroll
      for (int i = 0; i < kMine; ++i) {
        m[i] = value_of<float>(read.m, i);
        if constexpr (!kLion) v[i] = value_of<float>(read.v, i);
      }
    }
    if (kCare && w.t.compensation) {
#pragma unroll
      for (int i = 0; i < kMine; ++i) x[i] = __fadd_rn(x[i], value_of<bf16>(read.compensation, i));
    }
    if (n.weight_decay != 0.0f) {
#pragma unroll
      for (int i = 0; i < kMine; ++i) g[i] = __fadd_rn(g[i], __fmul_rn(x[i], n.weight_decay));
    }
#pragma unroll
    for (int i = 0; i < kMine; ++i) x[i] = updated(n, __fmul_rn(x[i], n.decay), g[i], m[i], v[i]);
    if constexpr (kIs8bit) {
      if (!at.whole) {
        keep(m, v, [&](int i) { return i % kRun < at.count(i / kRun); });
      }
      float most1 = most_of(m), most2 = most_of(v);
      if (!(most1 <= FLT_MAX && most2 <= FLT_MAX)) {
        keep(m, v, [&](int i) { return is_finite(m[i]) && is_finite(v[i]); });
        most1 = most_of(m);
        most2 = most_of(v);
      }
      shared.codes1.encode(m, usable_reciprocal(most1), written.m);
      if constexpr (!kLion) shared.codes2.encode(v, usable_reciprocal(most2), written.v);
      __syncwarp();  // all lanes have read the previous absmax
      if (lane_index() == 0) {
        store(absmax1, most1);
        if constexpr (!kLion) store(absmax2, most2);
      }
    } else {
      to_raw(m, written.m);
      if constexpr (!kLion) to_raw(v, written.v);
    }
    // After the moments, which frees their registers.
    round_param<T, kCare>(w, at, x, written.p, written.compensation);
    at.whole ? written.template store_to<true>(w, at) : written.template store_to<false>(w, at);
  }

  template <class Which>
  static DEVICE void keep(float (&m)[kMine], float (&v)[kMine], const Which& which) {
#pragma unroll
    for (int i = 0; i < kMine; ++i) {
      if (!which(i)) m[i] = v[i] = 0;
    }
  }

  // The largest magnitude in the warp, in all lanes; NaN if there is one. Bits of non-negative floats are in
  // the order of their values.
  static DEVICE float most_of(const float (&x)[kMine]) {
    float most = 0;
#pragma unroll
    for (int i = 0; i < kMine; ++i) most = max_or_nan(most, fabsf(x[i]));
    return bit_cast<float>(__reduce_max_sync(kAllLanes, bit_cast<uint32_t>(most)));
  }

  // Each operation is rounded separately: the moments equal the reference to the bit.
  static DEVICE float updated(const StepCoefficients& n, float p, float g, float& m, float& v) {
    if constexpr (kLion) {
      const float u = __fadd_rn(__fmul_rn(m, n.b1), __fmul_rn(g, n.w1));
      const float sign = u > 0 ? 1.0f : u < 0 ? -1.0f : u;
      m = __fadd_rn(__fmul_rn(m, n.b2), __fmul_rn(g, n.w2));
      return __fadd_rn(p, -__fmul_rn(sign, n.lr));
    } else {
      m = __fadd_rn(__fmul_rn(m, n.b1), __fmul_rn(g, n.w1));
      v = __fadd_rn(__fmul_rn(v, n.b2), __fmul_rn(__fmul_rn(g, n.w2), g));
      return __fadd_rn(p, __fmul_rn(__fmul_rn(m, reciprocal(__fadd_rn(root(v), n.floor))), n.rate));
    }
  }

  template <class T, bool kCare>
  static DEVICE void round_param(const Work& w, const Place& at, const float (&x)[kMine], Raw& out,
                                 Raw& dropped) {
    if constexpr (sizeof(T) == 4) {
      to_raw(x, out);
    } else {
#pragma unroll
      for (int i = 0; i < kMine / 2; ++i) {
        out.v[2 * i / kRun].v[i % (kRun / 2)] = pack2<T>(x[2 * i], x[2 * i + 1]);
      }
    }
    if constexpr (sizeof(T) != 4 && kCare) {
      if (w.seed) round_stochastically(w, at, x, out);
      if (!w.t.compensation) return;
#pragma unroll
      for (int i = 0; i < kMine / 2; ++i) {
        const uint32_t pair = out.v[2 * i / kRun].v[i % (kRun / 2)];
        dropped.v[2 * i / kRun].v[i % (kRun / 2)] = pack2<bf16>(
            __fadd_rn(x[2 * i], -low_half<bf16>(pair)), __fadd_rn(x[2 * i + 1], -high_half<bf16>(pair)));
      }
    }
  }
  static DEVICE void round_stochastically(const Work& w, const Place& at, const float (&x)[kMine], Raw& out) {
    const auto seed =
        static_cast<uint64_t>(load(w.seed));  // loaded each time, to keep the keys out of registers
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      const Words4 words = philox((at.first + run * kRunStride) / kRun, seed, w.t.index, w.step);
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        const float value = x[run * kRun + i];
        if (value != value) continue;
        const uint32_t half = (bit_cast<uint32_t>(value) + (words.v[i] >> 16)) >> 16;
        uint32_t& pair = out.v[run].v[i / 2];
        pair = i % 2 ? pair & 0xffff | half << 16 : pair & 0xffff0000 | half;
      }
    }
  }

  static DEVICE void to_raw(const float (&x)[kMine], Raw& out) {
#pragma unroll
    for (int i = 0; i < kMine; ++i) out.v[i / kRun].v[i % kRun] = bit_cast<uint32_t>(x[i]);
  }
};

}  // namespace peft_kernels::cuda
