// The loss of rows of logits, and the gradients of the logits. One block per row.
#pragma once

#include "../core/activation.cuh"
#include "cross_entropy.h"

namespace peft_kernels::cuda {

// z is computed in a unit that makes the exponential cheap: in fp32 it is an ordinary one, for logits of 16
// bits a power of two, whose error is far below theirs.
template <class T>
inline constexpr float kUnit = sizeof(T) == 4 ? 1.0f : 1.4426950408889634f;

// z times this is a natural logarithm.
template <class T>
inline constexpr float kNatural = sizeof(T) == 4 ? 1.0f : 0.6931471805599453f;

template <class T>
DEVICE float exponential(float x) {
  if constexpr (sizeof(T) == 4) return expf(x);
  return exp2_approximate(x);
}

// tanh(x / 2) of x in this unit. In 16 bits its absolute error is far below that of the logits.
template <class T>
DEVICE float tanh_of_half(float x) {
  if constexpr (sizeof(T) == 4) return tanhf(0.5f * x);
  return __fmaf_rn(-2.0f, reciprocal(1.0f + exponential<T>(x)), 1.0f);
}

// log(1 + x) for x from 0 to 1: the second term is what the sum has lost.
DEVICE float log_plus_one(float x) {
  const float sum = 1.0f + x;
  return logf(sum) + (x - (sum - 1.0f)) / sum;
}

// Softcap and scale.
template <class T, bool kCapped>
class LogitShape {
 public:
  DEVICE LogitShape(float scale, float cap)
      : factor_(scale * kUnit<T> * (kCapped ? 2.0f / cap : 1.0f)), cap_(cap * kUnit<T>) {}

  // z, and its derivative with respect to the scaled logit.
  DEVICE ValueGradient operator()(float logit) const {
    const float z = logit * factor_;
    if constexpr (!kCapped) return {z, 1.0f};
    const float tanh = tanh_of_half<T>(z);
    return {cap_ * tanh, __fmaf_rn(-tanh, tanh, 1.0f)};
  }

 private:
  float factor_, cap_;
};

struct LossRowParams {
  LossOptions options;
  const int64_t* labels;
  void* logits;
  int64_t ld;
  int cols;     // of ld
  int vectors;  // of 16 bytes in a row, 0 if rows are not aligned
  const int64_t* rows;
  int64_t first_row;
  LossResults results;
  // backward
  int64_t first_col;
  LogitFactors factors;
};

// The loops over a row that both kernels share.
template <class T>
struct LossRow {
  static constexpr int kThreads = 512;
  static constexpr int kBlocksPerSm = 2;
  static constexpr int kWidth = 16 / sizeof(T);
  using Params = LossRowParams;

 protected:
  static DEVICE T* logits_of_block(const Params& p) {
    return static_cast<T*>(p.logits) + int64_t{block_index()} * p.ld;
  }

  // Calls body(column, values) for this thread's part of a row.
  template <class Body>
  static DEVICE void read(const Params& p, const T* row, const Body& body) {
#pragma unroll 2
    for (int i = thread_index(); i < p.vectors; i += kThreads) {
      body(i * kWidth, load(reinterpret_cast<const Vec<T, kWidth>*>(row) + i));
    }
#pragma unroll 1
    for (int i = first_single(p); i < p.cols; i += kThreads) {
      body(i, load(reinterpret_cast<const Vec<T, 1>*>(row) + i));
    }
  }

  // Replaces each logit by body(logit). From the end of the row on: what read() read last is still in L2.
  template <class Body>
  static DEVICE void replace(const Params& p, T* row, const Body& body) {
#pragma unroll 1
    for (int i = first_single(p); i < p.cols; i += kThreads) replace_at<1>(row + i, body);
    const int turns = (p.vectors + kThreads - 1 - thread_index()) / kThreads;
#pragma unroll 2
    for (int i = turns - 1; i >= 0; --i) {
      replace_at<kWidth>(row + int64_t{i * kThreads + thread_index()} * kWidth, body);
    }
  }
  static DEVICE void clear(const Params& p, T* row) {
#pragma unroll 1
    for (int i = thread_index(); i < p.vectors; i += kThreads) {
      store(reinterpret_cast<Vec<T, kWidth>*>(row) + i, Vec<T, kWidth>{});
    }
#pragma unroll 1
    for (int i = first_single(p); i < p.cols; i += kThreads) store(row + i, T{});
  }
  // After replace().
  static DEVICE void replace_one(T* at, float value) {
    __syncthreads();
    if (thread_index() == 0) store(at, from_float<T>(value));
  }

 private:
  // After the vectors.
  static DEVICE int first_single(const Params& p) { return p.vectors * kWidth + thread_index(); }

  template <int kCount, class Body>
  static DEVICE void replace_at(T* at, const Body& body) {
    auto* vector = reinterpret_cast<Vec<T, kCount>*>(at);
    Vec<T, kCount> values = load(vector);
#pragma unroll
    for (int i = 0; i < kCount; ++i) values.v[i] = from_float<T>(body(to_float(values.v[i])));
    store(vector, values);
  }
};

// The loss of a row and its gradient. The label's logit is left out of the sums and added at the end: near
// certainty p - 1 must not be a difference of rounded values.
template <class T, bool kCapped, bool kGradient>
struct CrossEntropy : LossRow<T> {
  using Base = LossRow<T>;
  using Params = LossRowParams;
  static constexpr int kWarps = Base::kThreads / kWarp;

  struct Shared {
    float max[kWarps];
    float sums[4][kWarps];
  };

  static DEVICE void run(const Params& p) {
    const LossOptions& options = p.options;
    T* logits = Base::logits_of_block(p);
    const int64_t row = p.rows ? load_constant(p.rows + block_index()) : p.first_row + block_index();
    const int64_t label = load_constant(p.labels + row);
    if (label == options.ignore_index) {
      if constexpr (kGradient) Base::clear(p, logits);
      return write(p, row, {0.0f, 0.0f, 0.0f, 0.0f, 0.0f, false});
    }
    const LogitShape<T, kCapped> shape(options.scale, options.cap);
    const bool is_valid = 0 <= label && label < options.vocabulary;
    const float nan = __int_as_float(0x7fffffff);
    const ValueGradient of_label = shape(is_valid ? to_float(load(logits + label)) : nan);

    const State state = statistics(p, logits, is_valid ? static_cast<int>(label) : -1, shape);
    // The others against the label: logarithm of their odds, and probabilities.
    const float below = (of_label.value - state.max) * kNatural<T>;
    const float odds = logf(state.sum) - below;
    const Sigmoid rest = sigmoid(odds);
    const float surprise = (odds > 0.0f ? odds : 0.0f) + log_plus_one(expf(-fabsf(odds)));
    const float above = below < 0.0f ? logf(state.sum + expf(below)) : surprise;  // lse - max
    const float lse = state.max * kNatural<T> + above, mean = state.total * kNatural<T> / p.cols;
    const float peak = expf(-above);  // the probability of a logit at the maximum
    RowLoss result{
        (1.0f - options.smoothing) * surprise + options.z_loss * lse * lse, lse,
        above - peak * state.weighted * kNatural<T> - rest.rest * below,    mean,
        logf(peak * peak * state.squares + rest.rest * rest.rest),          state.max <= of_label.value};
    if (options.smoothing > 0.0f) result.loss += options.smoothing * (lse - mean);
    write(p, row, result);

    if constexpr (kGradient) {
      const float of_square = 2.0f * options.z_loss * lse, even = options.smoothing / p.cols;
      const float label_gradient =
          (of_square * rest.rest + (options.smoothing - even) - rest.value) * of_label.gradient;
      const float factor = (1.0f + of_square) * options.scale, shift = lse * kUnit<T>;
      Base::replace(p, logits, [&](float logit) {
        const ValueGradient z = shape(logit);
        return __fmaf_rn(exponential<T>(z.value - shift), factor, -even * options.scale) * z.gradient;
      });
      if (is_valid) Base::replace_one(logits + label, label_gradient * options.scale);
    }
  }

 private:
  // Of the logits z seen so far: the maximum, and the sum of all. Of e = exp(z - max) without the label's:
  // the sums of e, of e (z - max) and of e^2.
  struct State {
    float max, total, sum, weighted, squares;

    DEVICE void raise(float new_max) {
      const float step = max - new_max, factor = exponential<T>(step);
      weighted = __fmaf_rn(sum, step, weighted) * factor;
      sum *= factor;
      squares *= factor * factor;
      max = new_max;
    }
  };

  struct RowLoss {
    float loss, lse, entropy, mean, squares;
    bool top;
  };

  static DEVICE State statistics(const Params& p, const T* logits, int label,
                                 const LogitShape<T, kCapped>& shape) {
    // Not infinite: differences are computed.
    State state{-1e30f, 0.0f, 0.0f, 0.0f, 0.0f};
    Base::read(p, logits, [&](int col, const auto& values) {
      constexpr int kCount = sizeof(values.v) / sizeof(T);
      float z[kCount], e[kCount], max = state.max;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        z[i] = shape(to_float(values.v[i])).value;
        max = fmaxf(max, z[i]);
        state.total += z[i];
      }
      state.raise(max);
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        z[i] -= max;
        e[i] = exponential<T>(z[i]);
      }
      if (const int at = label - col; 0 <= at && at < kCount) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) e[i] = i == at ? 0.0f : e[i];
      }
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        state.sum += e[i];
        state.weighted = __fmaf_rn(e[i], z[i], state.weighted);
        state.squares = __fmaf_rn(e[i], e[i], state.squares);
      }
    });
    return of_block(state);
  }

  // Combines the threads' statistics; every thread gets the same.
  static DEVICE State of_block(State state) {
    Shared& shared = *shared_memory<Shared>();
    const int warp = warp_index();
    float max = across<kWarp>(state.max, [](float a, float b) { return fmaxf(a, b); });
    if (lane_index() == 0) store(&shared.max[warp], max);
    __syncthreads();
    max = across<kWarps>(load(&shared.max[lane_index() % kWarps]),
                         [](float a, float b) { return fmaxf(a, b); });
    state.raise(max);
    float* const sums[] = {&state.total, &state.sum, &state.weighted, &state.squares};
    const auto add = [](float a, float b) { return a + b; };
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float sum = across<kWarp>(*sums[i], add);
      if (lane_index() == 0) store(&shared.sums[i][warp], sum);
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 4; ++i) *sums[i] = across<kWarps>(load(&shared.sums[i][lane_index() % kWarps]), add);
    return state;
  }
  template <int kLanes, class Combine>
  static DEVICE float across(float value, const Combine& combine) {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) {
      value = combine(value, __shfl_xor_sync(kAllLanes, value, step));
    }
    return value;
  }

  static DEVICE void write(const Params& p, int64_t row, const RowLoss& result) {
    if (thread_index() != 0) return;
    store(p.results.loss + row, result.loss);
    store(p.results.lse + row, result.lse);
    if (p.results.entropy) {
      store(p.results.entropy + row, result.entropy);
      store(p.results.top + row, result.top);
    }
    if (p.results.mean) store(p.results.mean + row, result.mean);
    if (p.results.squares) store(p.results.squares + row, result.squares);
  }
};

// The gradients of some columns of a row, given its lse and factors.
template <class T, bool kCapped>
struct CrossEntropyBackward : LossRow<T> {
  using Base = LossRow<T>;
  using Params = LossRowParams;

  static DEVICE void run(const Params& p) {
    const LossOptions& options = p.options;
    T* logits = Base::logits_of_block(p);
    const int64_t label = load_constant(p.labels + block_index());
    if (label == options.ignore_index) return Base::clear(p, logits);
    const LogitShape<T, kCapped> shape(options.scale, options.cap);
    const auto of_row = [](const float* at) { return at ? load_constant(at + block_index()) : 0.0f; };
    const float shift = of_row(p.factors.lse) * kUnit<T>,
                of_label = of_row(p.factors.of_label) * options.scale;
    const float of_p = of_row(p.factors.of_p) * options.scale;
    const float of_pz = of_row(p.factors.of_pz) * options.scale * kNatural<T>;
    const float even = options.smoothing / options.vocabulary;
    constexpr float kLowest = -1e30f;  // of a masked logit; its probability is 0
    const auto gradient = [&](float logit, float term) {
      const ValueGradient z = shape(logit);
      const float factor = __fmaf_rn(of_pz, fmaxf(z.value, kLowest), of_p);
      return __fmaf_rn(exponential<T>(z.value - shift), factor, term) * z.gradient;
    };
    const int64_t col = label - p.first_col;
    const bool is_here = 0 <= col && col < p.cols;
    const float label_logit = is_here ? to_float(load(logits + col)) : 0.0f;
    __syncthreads();  // before it is replaced
    Base::replace(p, logits, [&](float logit) { return gradient(logit, -even * of_label); });
    if (is_here) {
      Base::replace_one(logits + col, gradient(label_logit, (options.smoothing - 1.0f - even) * of_label));
    }
  }
};

}  // namespace peft_kernels::cuda
