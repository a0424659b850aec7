// Launches CrossEntropy and CrossEntropyBackward.
#include <type_traits>

#include "../core/launch.cuh"
#include "cross_entropy.cuh"

namespace peft_kernels::cuda {
namespace {

template <class T>
LossRowParams params_of(const LogitRows& logits, int64_t cols, const LossOptions& options,
                        const int64_t* labels) {
  constexpr int64_t kWidth = LossRow<T>::kWidth;
  LossRowParams params{};
  params.options = options;
  params.labels = labels;
  params.logits = logits.logits;
  params.ld = logits.ld;
  params.cols = static_cast<int>(cols);
  params.vectors =
      logits.ld % kWidth == 0 && are_aligned({logits.logits}) ? static_cast<int>(cols / kWidth) : 0;
  return params;
}

// Calls body(type, is_capped) with values of the logits' type, and of std::true_type or std::false_type.
template <class Body>
void with_kind(const LogitRows& logits, const LossOptions& options, const Body& body) {
  with_type(logits.dtype, [&](auto type) {
    options.cap > 0.0f ? body(type, std::true_type{}) : body(type, std::false_type{});
  });
}

}  // namespace

void cross_entropy(const LogitRows& logits, const LossOptions& options, const int64_t* labels,
                   const int64_t* rows, int64_t first_row, const LossResults& results, bool need_gradient,
                   Stream stream) {
  with_kind(logits, options, [&](auto type, auto is_capped) {
    using T = decltype(type);
    constexpr bool kCapped = decltype(is_capped)::value;
    LossRowParams params = params_of<T>(logits, options.vocabulary, options, labels);
    params.rows = rows;
    params.first_row = first_row;
    params.results = results;
    using Shared = typename CrossEntropy<T, kCapped, true>::Shared;
    need_gradient ? launch<CrossEntropy<T, kCapped, true>>(params, logits.count, stream, sizeof(Shared))
                  : launch<CrossEntropy<T, kCapped, false>>(params, logits.count, stream, sizeof(Shared));
  });
}

void cross_entropy_backward(const LogitRows& logits, int64_t first_col, int64_t cols,
                            const LossOptions& options, const int64_t* labels, const LogitFactors& factors,
                            Stream stream) {
  with_kind(logits, options, [&](auto type, auto is_capped) {
    using T = decltype(type);
    LossRowParams params = params_of<T>(logits, cols, options, labels);
    params.first_col = first_col;
    params.factors = factors;
    launch<CrossEntropyBackward<T, decltype(is_capped)::value>>(params, logits.count, stream);
  });
}

}  // namespace peft_kernels::cuda
