// The losses of rows under a frozen head, and the gradients of x, in one pass as in FlashAttention (Dao et
// al. 2022), with the head in the role of keys and values: logits are computed tile by tile along the
// vocabulary, and earlier sums are rescaled when a tile raises the maximum. The label's own logit is added at
// the end: near certainty p - 1 must not be a difference of rounded values.
#pragma once

#include <array>
#include <cfloat>
#include <cmath>
#include <utility>
#include <vector>

#include "cross_entropy_head.h"

namespace peft_kernels::cpu {

inline constexpr int64_t kTorchRows = 512;     // rows at a time, where torch computes the GEMMs
inline constexpr int64_t kMostLossRows = 256;  // rows of a task: twice as many are no faster
static_assert(kMostLossRows % kPackRows == 0, "");
inline constexpr int64_t kMostBlocks = 4;  // blocks that a task processes side by side

struct Options {
  float scale, cap;
  double smoothing, z_loss;
  bool need_dx, need_entropy, need_mean, need_squares;
};

// Where the results go.
struct Results {
  float *loss, *lse, *entropy, *mean, *squares;
  bool* top;
  char* dx;
};

class Loss {
 public:
  Loss(Tensor x, Head& head, int64_t vocabulary, const Tensor& bias, const Labelled& labelled,
       const Options& options)
      : x_(std::move(x)),
        head_(head),
        vocabulary_(vocabulary),
        bias_(bias),
        labelled_(labelled),
        options_(options),
        rows_(x_.size(0)),
        features_(x_.size(1)),
        dtype_(dtype_of(x_, "x")),
        tile_cols_(head.tile_cols()) {
    // With few rows the vocabulary is divided into parts to keep threads busy. Only the number of rows
    // decides, as sums depend on it.
    const int64_t wanted = head.uses_torch(rows_) || rows_ > kMostLossRows ? 1 : rows_ > kPackRows ? 2 : 8;
    part_cols_ = ceil_div(ceil_div(vocabulary_, wanted), tile_cols_) * tile_cols_;
    parts_ = ceil_div(vocabulary_, part_cols_);
    states_.assign(parts_ * rows_, {-FLT_MAX, 0.0f, 0.0f, 0.0f, 0.0f, 0.0f});
    if (options.need_dx && options.smoothing > 0) mean_ = mean_row();
  }

  // Computes the rows that have a label.
  void run(const Results& to) {
    const auto finish = [&](int64_t begin, int64_t end, const float* sums, int64_t part_ld) {
      const Tensor buffer = head_.buffer(1);
      for (int64_t row = begin; row < end; ++row) {
        finish_row(row, sums ? sums + (row - begin) * features_ : nullptr, part_ld, buffer, to);
      }
    };
    head_.uses_torch(rows_) ? run_with_torch(finish) : run_with_kernels(finish);
  }

 private:
  Tensor mean_row() const {
    Tensor sum = at::empty({1, features_}, x_.options().dtype(at::kFloat));
    const Tensor ones = at::ones({1, vocabulary_}, x_.options().dtype(at::kFloat));
    Nf4View view{};
    const int64_t step = head_.rounds() ? tile_cols_ : vocabulary_;
    const Tensor buffer = head_.buffer(std::min(step, vocabulary_));
    for (int64_t first = 0; first < vocabulary_; first += step) {
      const int64_t count = std::min(step, vocabulary_ - first);
      const Tensor part_of_ones = ones.slice(1, first, first + count);
      Gemm gemm(sum);
      if (first > 0) gemm.accumulate();
      gemm.add(term_of(part_of_ones, "ones", head_.rows(first, count, view, buffer)));
      gemm.run_nn();
    }
    return sum.div_(static_cast<double>(vocabulary_));
  }

  SoftmaxParams softmax(int64_t part, int64_t first_row, int64_t first_col, int64_t cols) {
    SoftmaxParams p{};
    p.first_col = first_col;
    p.cols = cols;
    p.bias = bias_.defined() ? bias_.const_data_ptr<float>() + first_col : nullptr;
    p.scale = options_.scale;
    p.cap = options_.cap;
    p.labels = labelled_.labels.data() + first_row;
    p.states = states_.data() + part * rows_ + first_row;
    p.need_weighted = options_.need_entropy;
    p.need_squares = options_.need_squares;
    p.need_total = options_.smoothing > 0 || options_.need_mean;
    p.out_dtype = dtype_;
    p.features = features_;
    return p;
  }

  // Buffers of one thread.
  struct Buffers {
    int64_t block;  // rows
    std::array<Tensor, kMostBlocks> packed;
    Tensor logits, sums, weight;
  };

  template <class Finish>
  void run_with_kernels(const Finish& finish) {
    const int64_t threads = useful_threads(rows_ * vocabulary_ * features_ * (1 + options_.need_dx));
    const int64_t share = ceil_div(ceil_div(rows_, 2 * threads), kPackRows) * kPackRows;
    const int64_t block = std::min(std::clamp(share, kPackRows, kMostLossRows), rows_);
    const int64_t side_by_side = blocks_of_task(ceil_div(rows_, block), threads);
    const int64_t task_rows = std::min(side_by_side * block, rows_);
    const int64_t ranges = ceil_div(rows_, task_rows), tasks = ranges * parts_;
    head_.prepare(ranges);
    Tensor all_sums;
    const bool keeps = options_.need_dx && parts_ > 1;
    if (keeps) all_sums = at::empty({parts_, rows_, features_}, x_.options().dtype(at::kFloat));
    run_tasks(tasks, threads, [&](Share& share) {
      Buffers buffers;
      const auto floats = x_.options().dtype(at::kFloat);
      buffers.block = block;
      buffers.logits = at::empty({block, tile_cols_}, floats);
      buffers.weight = head_.buffer(std::min(tile_cols_, vocabulary_));
      if (options_.need_dx && !keeps) buffers.sums = at::empty({task_rows, features_}, floats);
      void* scratch = checked_thread_scratch();
      for (int64_t task; share.take(task);) {
        const int64_t part = task / ranges, begin = task % ranges * task_rows,
                      end = std::min(begin + task_rows, rows_);
        float* sums = keeps ? all_sums.mutable_data_ptr<float>() + (part * rows_ + begin) * features_
                      : options_.need_dx ? buffers.sums.mutable_data_ptr<float>()
                                         : nullptr;
        run_task(part, begin, end, buffers, sums, scratch);
        if (parts_ == 1) finish(begin, end, sums, 0);
      }
    });
    if (parts_ == 1) return;
    parallel_for(0, rows_, ceil_div(kElementwiseGrain, features_ * parts_ + 1),
                 [&](int64_t begin, int64_t end) {
                   finish(begin, end, keeps ? all_sums.const_data_ptr<float>() + begin * features_ : nullptr,
                          rows_ * features_);
                 });
  }

  // How many blocks share a tile of the head, which the first of them fetches, and rounds if necessary: as
  // many as do not lengthen the busiest thread. On a busy machine tasks should be short.
  int64_t blocks_of_task(int64_t blocks, int64_t threads) const {
    const auto longest = [&](int64_t together) {
      return ceil_div(ceil_div(blocks, together) * parts_, threads) * together;
    };
    int64_t together = is_busy() ? 1 : kMostBlocks;
    while (longest(together) > longest(1)) --together;
    return together;
  }

  void run_task(int64_t part, int64_t begin, int64_t end, Buffers& buffers, float* sums, void* scratch) {
    if (sums) std::fill_n(sums, (end - begin) * features_, 0.0f);
    bool is_first = true;
    for (int64_t first = part * part_cols_; first < std::min((part + 1) * part_cols_, vocabulary_);
         first += tile_cols_, is_first = false) {
      const int64_t cols = std::min(tile_cols_, vocabulary_ - first);
      Nf4View view{};
      const MatrixView weight = head_.rows(first, cols, view, buffers.weight);
      for (int64_t m = begin; m < end; m += buffers.block) {
        const int64_t rows = std::min(buffers.block, end - m);
        make_logits(weight, cols, m, rows, (m - begin) / buffers.block, is_first, buffers, scratch);
        float* block_sums = sums ? sums + (m - begin) * features_ : nullptr;
        float* logits = buffers.logits.mutable_data_ptr<float>();
        SoftmaxParams softmax = this->softmax(part, m, first, cols);
        softmax.logits = logits;
        softmax.logits_dtype = DType::kF32;
        softmax.logits_ld = tile_cols_;
        softmax.sums = block_sums;
        softmax.out = sums ? logits : nullptr;
        softmax.out_ld = tile_cols_ * 4 / x_.element_size();
        kernels().softmax_tile(softmax, 0, rows);
        if (sums) add_back(weight, cols, rows, softmax, scratch);
      }
    }
  }

  // For a block of rows from row `begin` on, number `index` of its task.
  void make_logits(const MatrixView& weight, int64_t cols, int64_t begin, int64_t rows, int64_t index,
                   bool is_first, Buffers& buffers, void* scratch) const {
    const void* x = element_ptr(x_, begin * features_);
    const GemmTerm term{x, dtype_, features_, weight, 1.0f, features_};
    // rows_, so that plan and sums are the same for any task.
    GemmParams nt = one_term_params(term, rows_, cols, buffers.logits.mutable_data_ptr(), DType::kF32);
    nt.out_ld = tile_cols_;
    nt.plan = kernels().plan_nt(nt);
    const Rect rect{0, rows, 0, cols};
    if (nt.plan != NtPlan::kPairs && nt.plan != NtPlan::kFloats) {
      return kernels().gemm_nt(nt, rect, scratch);
    }
    Tensor& packed = buffers.packed[index];
    if (!packed.defined()) packed = packed_buffer(buffers.block, features_, nt.plan, x_.options());
    if (is_first) {
      const PackParams params{x, dtype_, rows, features_, nt.plan, packed.mutable_data_ptr()};
      kernels().pack_strips(params, 0, ceil_div(rows, kPackRows));
    }
    nt.packed_lhs = packed.const_data_ptr();
    nt.packed_end = rows;
    kernels().gemm_packed(nt, rect, scratch);
  }

  // Accumulates the exponentials of a tile times the head into the sums.
  void add_back(const MatrixView& weight, int64_t cols, int64_t rows, const SoftmaxParams& softmax,
                void* scratch) const {
    const GemmTerm term{softmax.out, dtype_, softmax.out_ld, weight, 1.0f, cols};
    GemmParams nn = one_term_params(term, rows_, features_, softmax.sums, DType::kF32);
    nn.add_to_out = true;
    kernels().gemm_nn(nn, {0, rows, 0, features_}, scratch);
  }

  template <class Finish>
  void run_with_torch(const Finish& finish) {
    const auto softmax_tile = kernels().softmax_tile;
    head_.prepare(ceil_div(rows_, kTorchRows));
    for (int64_t begin = 0; begin < rows_; begin += kTorchRows) {
      const int64_t end = std::min(begin + kTorchRows, rows_), rows = end - begin;
      const Tensor x = x_.slice(0, begin, end);
      Tensor sums;
      if (options_.need_dx) sums = at::zeros({rows, features_}, x_.options().dtype(at::kFloat));
      for (int64_t first = 0; first < vocabulary_; first += tile_cols_) {
        const int64_t last = std::min(first + tile_cols_, vocabulary_);
        const Tensor weight = head_.dense(first, last);
        Tensor logits = at::mm(x, weight.t()).contiguous();
        SoftmaxParams p = softmax(0, begin, first, last - first);
        p.logits = logits.mutable_data_ptr();
        p.logits_dtype = dtype_;
        p.logits_ld = p.out_ld = last - first;
        p.sums = sums.defined() ? sums.mutable_data_ptr<float>() : nullptr;
        p.out = sums.defined() ? p.logits : nullptr;
        parallel_for(0, rows, ceil_div(kElementwiseGrain / 4, last - first),
                     [&](int64_t i, int64_t j) { softmax_tile(p, i, j); });
        if (!sums.defined()) continue;
        dtype_ == DType::kF32 ? sums.addmm_(logits, weight) : sums.add_(at::mm(logits, weight));
      }
      parallel_for(0, rows, ceil_div(kElementwiseGrain, features_ + 1), [&](int64_t i, int64_t j) {
        finish(begin + i, begin + j, sums.defined() ? sums.const_data_ptr<float>() + i * features_ : nullptr,
               0);
      });
    }
  }

  // Combines the states of a row's parts, and their sums, which are part_ld apart.
  void finish_row(int64_t row, const float* sums, int64_t part_ld, const Tensor& buffer,
                  const Results& results) const {
    double maximum = -DBL_MAX, rest = 0, weighted = 0;  // without the label's
    double squares = 0, total = 0;
    const int64_t label = labelled_.labels[row];
    const double label_logit = state(label / part_cols_, row).label;
    for (int64_t i = 0; i < parts_; ++i) maximum = std::max<double>(maximum, state(i, row).max);
    std::array<double, 8> factors{};
    for (int64_t i = 0; i < parts_; ++i) {
      const SoftmaxState& s = state(i, row);
      total += s.total;
      if (s.max == -FLT_MAX) continue;  // has only seen the label
      factors[i] = std::exp(s.max - maximum);
      rest += s.sum * factors[i];
      weighted += s.weighted * factors[i];
      squares += s.squares * factors[i] * factors[i];
    }
    // log(1 + rest / label's), computed from the larger one.
    const double log_odds = maximum - label_logit + std::log(rest);
    const double surprise =
        log_odds > 0 ? log_odds + std::log1p(std::exp(-log_odds)) : std::log1p(std::exp(log_odds));
    const double lse = label_logit + surprise;
    const double p_rest = std::exp(maximum - lse) * rest, p_label = std::exp(-surprise);
    const double smoothing = options_.smoothing, z_loss = options_.z_loss;
    const int64_t to = labelled_.rows[row];
    results.loss[to] = static_cast<float>((1 - smoothing) * surprise + z_loss * lse * lse +
                                          (smoothing > 0 ? smoothing * (lse - total / vocabulary_) : 0));
    results.lse[to] = static_cast<float>(lse);
    if (options_.need_mean) results.mean[to] = static_cast<float>(total / vocabulary_);
    if (options_.need_entropy) {
      results.top[to] = maximum <= label_logit;
      results.entropy[to] =
          static_cast<float>(lse - std::exp(maximum - lse) * weighted - p_label * label_logit);
    }
    if (options_.need_squares) {
      const double peak = std::exp(maximum - lse);
      results.squares[to] = static_cast<float>(std::log(squares * peak * peak + p_label * p_label));
    }
    if (!sums) return;
    const double z_gradient = 2 * z_loss * lse;
    std::array<float, 8> part_factors{};
    for (int64_t i = 0; i < parts_; ++i) {
      part_factors[i] =
          static_cast<float>((1 + z_gradient) * factors[i] * std::exp(maximum - lse) * options_.scale);
    }
    const double tanh = options_.cap > 0 ? label_logit / options_.cap : 0;
    SoftmaxDxParams p{};
    p.sums = sums;
    p.factors = part_factors.data();
    p.parts = parts_;
    p.part_ld = part_ld;
    p.features = features_;
    Nf4View view{};
    p.weight = head_.rounds() ? head_.rows(label, 1, view, buffer) : head_.rows_from(0, view);
    p.label = head_.rounds() ? 0 : label;
    p.label_factor =
        static_cast<float>((z_gradient * p_label + smoothing - p_rest) * (1 - tanh * tanh) * options_.scale);
    p.mean = mean_.defined() ? mean_.const_data_ptr<float>() : nullptr;
    p.mean_factor = static_cast<float>(-smoothing * options_.scale);
    p.out = results.dx + to * features_ * x_.element_size();
    p.dtype = dtype_;
    kernels().softmax_dx(p);
  }
  const SoftmaxState& state(int64_t part, int64_t row) const { return states_[part * rows_ + row]; }

  const Tensor x_;
  Head& head_;
  const int64_t vocabulary_;
  const Tensor bias_;
  const Labelled& labelled_;
  const Options options_;
  const int64_t rows_, features_;
  const DType dtype_;
  const int64_t tile_cols_;
  int64_t part_cols_, parts_;
  std::vector<SoftmaxState> states_;  // [part][row]
  Tensor mean_;                       // mean row of the head, or undefined
};

}  // namespace peft_kernels::cpu
