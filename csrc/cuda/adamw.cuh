// A step of AdamW, Adam or Lion, as peft_kernels/ops/adamw.py has it, in one pass over all parameters.
//
// Blocks of a moment, 256 elements each, are numbered through all parameters, and each block of threads has a
// run of them: it looks its first parameter up once, and computes what depends on step and lr once for each
// parameter. A warp has a block of a moment at a time, so its absmax is a matter of shuffles, and a lane
// eight elements in two runs of four, which loads of all types read without gaps.
#pragma once

#include <cfloat>

#include "adamw_elements.cuh"
#include "dropout.cuh"
#include "dynamic_codes.cuh"

namespace peft_kernels::cuda {

DEVICE bool is_finite(float x) { return (bit_cast<uint32_t>(x) & 0x7fffffff) < 0x7f800000; }

// 1 / x to the nearest, for x > 0. What __frcp_rn does, without its slow path: x is brought to where there is
// none.
DEVICE float rounded_reciprocal(float x) {
  constexpr float kUp = 0x1p64f, kDown = 0x1p-64f;
  const float factor = x < kDown ? kUp : x > kUp ? kDown : 1.0f;
  const float scaled = __fmul_rn(x, factor), about = reciprocal(scaled);
  const float close = __fmaf_rn(about, __fmaf_rn(-scaled, about, 1.0f), about);
  return __fmul_rn(close, factor);
}
// The same of an absmax: 0 where it overflows, or is 0 / 0.
DEVICE float usable_reciprocal(float x) {
  const float found = rounded_reciprocal(x);
  return found <= FLT_MAX ? found : 0.0f;
}

// What a parameter's elements have in common.
struct StepNumbers {
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
  static constexpr int kBlocksPerSm = 5;

  struct Params {
    Step step;
    Shares shares;
    const float* factor;  // or null: 1 / grad_scale
  };
  struct Shared {
    DynamicCodes codes1, codes2;
    StepNumbers numbers;
  };

  static DEVICE void run(const Params& params) {
    const Step& p = params.step;
    if (p.found_inf && load_constant(p.found_inf) != 0.0f) return;
    Shared* shared = shared_memory<Shared>();
    shared->codes1.template fill<true, kThreads>();
    if constexpr (!kLion) shared->codes2.template fill<false, kThreads>();
    float factor = 1.0f;
    if (params.factor) {
      factor = load_constant(params.factor);
    } else if (p.grad_scale) {
      factor = rounded_reciprocal(load_constant(p.grad_scale));
    }
    for_each_tensor(p, params.shares, [&](int i, int begin, int end) {
      const StepTensor& t = p.tensors[i];
      const int64_t step = load_constant(p.step + t.index);
      __syncthreads();  // the tables are there, and the numbers before were read
      if (warp_index() == 0) compute_numbers(p, t, step, shared->numbers);
      __syncthreads();
      const StepNumbers& n = shared->numbers;
      const void* grad = p.grads[i];
      const bool has_vectors = t.has_vectors && is_aligned(grad);
      for (int block = begin + warp_index(); block < end; block += kStepWarps) {
        one_block(*shared, p, t, n, grad, factor, static_cast<uint32_t>(step), block,
                  place(block, t.numel, has_vectors));
      }
    });
  }

 private:
  // By a warp, of which two lanes have a power each.
  static DEVICE void compute_numbers(const Step& p, const StepTensor& t, int64_t step, StepNumbers& out) {
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

  static DEVICE void one_block(const Shared& shared, const Step& p, const StepTensor& t, const StepNumbers& n,
                               const void* grad, float factor, uint32_t step, int block, const Place& at) {
    const bool is_8bit = t.absmax1 != nullptr;
    Raw raw_p, raw_g, raw_m, raw_v;
    float scale1 = 0, scale2 = 0;
    load_floats(t.param, t.dtype, at, raw_p);
    load_floats(grad, t.dtype, at, raw_g);
    if (is_8bit) {
      load_runs<uint8_t>(t.state1, at, raw_m);
      scale1 = load(t.absmax1 + block);
      if constexpr (!kLion) {
        load_runs<uint8_t>(t.state2, at, raw_v);
        scale2 = load(t.absmax2 + block);
      }
    } else {
      load_runs<uint32_t>(t.state1, at, raw_m);
      if constexpr (!kLion) load_runs<uint32_t>(t.state2, at, raw_v);
    }

    float m[kRuns][kRun], v[kRuns][kRun] = {};
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      float x[kRun];
#pragma unroll
      for (int i = 0; i < kRun; ++i) x[i] = number(raw_p.v[run], t.dtype, i);
      if (t.compensation) add_compensation(t, at, run, x);
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        float g = __fmul_rn(number(raw_g.v[run], t.dtype, i), factor);
        if (is_8bit) {
          m[run][i] = __fmul_rn(load(&shared.codes1.map[code(raw_m.v[run], i)]), scale1);
          if constexpr (!kLion)
            v[run][i] = __fmul_rn(load(&shared.codes2.map[code(raw_v.v[run], i)]), scale2);
        } else {
          m[run][i] = bit_cast<float>(raw_m.v[run].v[i]);
          if constexpr (!kLion) v[run][i] = bit_cast<float>(raw_v.v[run].v[i]);
        }
        if (n.weight_decay != 0.0f) g = __fadd_rn(g, __fmul_rn(x[i], n.weight_decay));
        x[i] = updated(n, __fmul_rn(x[i], n.decay), g, m[run][i], v[run][i]);
      }
      write_param(p, t, step, at, run, x);
    }
    if (!is_8bit) {
      write_floats(t.state1, at, m);
      if constexpr (!kLion) write_floats(t.state2, at, v);
      return;
    }
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        const bool counts = i < at.count(run) && is_finite(m[run][i]) && is_finite(v[run][i]);
        if (!counts) m[run][i] = v[run][i] = 0;
      }
    }
    write_codes<true>(shared.codes1, t.state1, t.absmax1 + block, at, m);
    if constexpr (!kLion) write_codes<false>(shared.codes2, t.state2, t.absmax2 + block, at, v);
  }

  static DEVICE void add_compensation(const StepTensor& t, const Place& at, int run, float (&x)[kRun]) {
    Words4 raw;
    load_run<uint16_t>(t.compensation, at, run, raw);
#pragma unroll
    for (int i = 0; i < kRun; ++i) x[i] = __fadd_rn(x[i], number(raw, DType::kBF16, i));
  }

  // Each operation rounded: the moments are the reference's to the bit.
  static DEVICE float updated(const StepNumbers& n, float p, float g, float& m, float& v) {
    if constexpr (kLion) {
      const float u = __fadd_rn(__fmul_rn(m, n.b1), __fmul_rn(g, n.w1));
      const float sign = u > 0 ? 1.0f : u < 0 ? -1.0f : u;
      m = __fadd_rn(__fmul_rn(m, n.b2), __fmul_rn(g, n.w2));
      return __fadd_rn(p, -__fmul_rn(sign, n.lr));
    } else {
      m = __fadd_rn(__fmul_rn(m, n.b1), __fmul_rn(g, n.w1));
      v = __fadd_rn(__fmul_rn(v, n.b2), __fmul_rn(__fmul_rn(g, n.w2), g));
      return __fadd_rn(p, __fmul_rn(quotient(m, __fadd_rn(root(v), n.floor)), n.rate));
    }
  }

  static DEVICE void write_param(const Step& p, const StepTensor& t, uint32_t step, const Place& at, int run,
                                 const float (&x)[kRun]) {
    Words4 raw;
    if (t.dtype == DType::kF32) {
#pragma unroll
      for (int i = 0; i < kRun; ++i) raw.v[i] = bit_cast<uint32_t>(x[i]);
      store_run<uint32_t>(t.param, at, run, raw);
      return;
    }
#pragma unroll
    for (int i = 0; i < kRun / 2; ++i) {
      raw.v[i] =
          t.dtype == DType::kBF16 ? pack2<bf16>(x[2 * i], x[2 * i + 1]) : pack2<fp16>(x[2 * i], x[2 * i + 1]);
    }
    if (p.seed && t.dtype == DType::kBF16) {
      const Words4 words = philox((at.first + run * kRunStride) / 4,
                                  static_cast<uint64_t>(load_constant(p.seed)), t.index, step);
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        if (x[i] != x[i]) continue;
        const uint32_t half = (bit_cast<uint32_t>(x[i]) + (words.v[i] >> 16)) >> 16;
        raw.v[i / 2] = i % 2 ? raw.v[i / 2] & 0xffff | half << 16 : raw.v[i / 2] & 0xffff0000 | half;
      }
    }
    store_run<uint16_t>(t.param, at, run, raw);
    if (!t.compensation) return;
    Words4 dropped;
#pragma unroll
    for (int i = 0; i < kRun / 2; ++i) {
      dropped.v[i] = pack2<bf16>(__fadd_rn(x[2 * i], -low_half<bf16>(raw.v[i])),
                                 __fadd_rn(x[2 * i + 1], -high_half<bf16>(raw.v[i])));
    }
    store_run<uint16_t>(t.compensation, at, run, dropped);
  }

  static DEVICE void write_floats(void* to, const Place& at, const float (&x)[kRuns][kRun]) {
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      Words4 raw;
#pragma unroll
      for (int i = 0; i < kRun; ++i) raw.v[i] = bit_cast<uint32_t>(x[run][i]);
      store_run<uint32_t>(to, at, run, raw);
    }
  }

  template <bool kSigned>
  static DEVICE void write_codes(const DynamicCodes& codes, void* to, float* absmax_out, const Place& at,
                                 const float (&x)[kRuns][kRun]) {
    float absmax = 0;
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
#pragma unroll
      for (int i = 0; i < kRun; ++i) absmax = fmaxf(absmax, fabsf(x[run][i]));
    }
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) {
      absmax = fmaxf(absmax, __shfl_xor_sync(kAllLanes, absmax, mask));
    }
    const float inverse = usable_reciprocal(absmax);
#pragma unroll
    for (int run = 0; run < kRuns; ++run) {
      Words4 raw{};
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        const float scaled = __fmul_rn(x[run][i], inverse);
        raw.v[0] |= (kSigned ? codes.signed_code(scaled) : codes.unsigned_code(scaled)) << (8 * i);
      }
      store_run<uint8_t>(to, at, run, raw);
    }
    __syncwarp();  // all lanes have read the one before
    if (lane_index() == 0) store(absmax_out, absmax);
  }
};

// What gradients are multiplied by so that together they are no longer than max_norm. Sums are in fp64, and
// those of blocks are added in their order by the one that is done last.
struct ClipFactor {
  static constexpr int kThreads = kStepThreads;
  static constexpr int kBlocksPerSm = 8;

  struct Params {
    Step step;
    Shares shares;
    float max_norm;
    double* sums;  // [blocks]
    float* factor;
    uint32_t* counter;
  };
  struct Shared {
    double by_warp[kStepWarps];
    uint32_t is_last;
  };

  static DEVICE void run(const Params& params) {
    const Step& p = params.step;
    Shared* shared = shared_memory<Shared>();
    const float scale = p.grad_scale ? rounded_reciprocal(load_constant(p.grad_scale)) : 1.0f;
    double sum = 0;
    for_each_tensor(p, params.shares, [&](int i, int begin, int end) {
      const DType dtype = p.tensors[i].dtype;
      const int64_t numel = load(&p.tensors[i].numel);
      const void* grad = p.grads[i];
      for (int block = begin + warp_index(); block < end; block += kStepWarps) {
        Raw raw;
        load_floats(grad, dtype, place(block, numel, is_aligned(grad)), raw);
#pragma unroll
        for (int at = 0; at < kRuns * kRun; ++at) {
          const double g = static_cast<double>(number(raw.v[at / kRun], dtype, at % kRun)) * scale;
          sum = __fma_rn(g, g, sum);
        }
      }
    });
    for (int mask = kWarp / 2; mask > 0; mask /= 2) sum = sum + __shfl_xor_sync(kAllLanes, sum, mask);
    const int warp = warp_index();
    if (lane_index() == 0) shared->by_warp[warp] = sum;
    __syncthreads();
    if (thread_index() == 0) {
      double of_block = 0;
      for (int i = 0; i < kStepWarps; ++i) of_block = of_block + shared->by_warp[i];
      params.sums[block_index()] = of_block;
      shared->is_last = atomic_add_ordered(params.counter, 1) + 1 == static_cast<uint32_t>(grid_size());
    }
    __syncthreads();
    if (shared->is_last == 0 || warp != 0) return;
    double all = 0;
    for (int i = lane_index(); i < grid_size(); i += kWarp) all = all + params.sums[i];
    for (int mask = kWarp / 2; mask > 0; mask /= 2) all = all + __shfl_xor_sync(kAllLanes, all, mask);
    if (lane_index() != 0) return;
    const float norm = static_cast<float>(__dsqrt_rn(all));
    const float clip = __fdiv_rn(params.max_norm, __fadd_rn(norm, 1e-6f));
    *params.factor = clip >= 1 ? scale : __fmul_rn(scale, clip);
    *params.counter = 0;
  }
};

struct StoreTable {
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerSm = 1;
  static constexpr int kMost = 496;

  struct Params {
    uint64_t* out;
    int count;
    uint64_t words[kMost];
  };

  static DEVICE void run(const Params& p) {
    for (int i = thread_index(); i < p.count; i += kThreads) p.out[i] = p.words[i];
  }
};

}  // namespace peft_kernels::cuda
