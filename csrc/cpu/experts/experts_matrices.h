// Small matrices of experts, the adapters and their gradients, moved between layouts: those of the experts
// that have rows, and no others.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "experts_args.h"

namespace peft_kernels::cpu {

template <class Body>
void with_scalar_type(at::ScalarType type, const Body& body) {
  if (type == at::kFloat) {
    body(float{});
  } else if (type == at::kBFloat16) {
    body(at::BFloat16{});
  } else {
    body(at::Half{});
  }
}

// Matrices in memory, out of tensors of three dimensions; those of one row or column may be taken as another
// layout has them.
struct MatrixStrides {
  int64_t matrix, row, col;
  int64_t rows, cols;

  explicit MatrixStrides(const Tensor& t)
      : matrix(t.stride(0)), row(t.stride(1)), col(t.stride(2)), rows(t.size(1)), cols(t.size(2)) {
    if (cols == 1) {
      std::swap(rows, cols);
      std::swap(row, col);
    }
    if (rows > 1 && row != col * cols) return;
    cols *= rows;
    rows = 1;
  }
};

// Which matrices of one tensor become which of another.
struct MatrixPlaces {
  std::vector<int64_t> from, to;
  int64_t count() const { return static_cast<int64_t>(from.size()); }
};

// Matrices, or columns of what lies side by side, that go through together: a line of memory has as many.
inline constexpr int64_t kColumnsTogether = 16, kRowsTogether = 4 * kTransposeRows;

// Matrices whose columns are contiguous become row-major, as `to` is.
inline void transpose_each(const Tensor& from, const MatrixStrides& s, Tensor& to,
                           const MatrixPlaces& places) {
  const int64_t blocks = ceil_div(s.cols, kRowsTogether), size = s.rows * s.cols;
  const auto transpose_rows = kernels().transpose_rows;
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t i = task / blocks, first = task % blocks * kRowsTogether;
      const TransposeParams params{
          address(from, places.from[i] * s.matrix), dtype_of(from, "from"), s.cols, s.rows, s.col,
          mutable_address(to, places.to[i] * size), dtype_of(to, "to"),     s.cols};
      transpose_rows(params, first, std::min(first + kRowsTogether, s.cols));
    }
  };
  parallel_for(0, places.count() * blocks, ceil_div(kElementwiseGrain, kRowsTogether * s.rows), run);
}

// Matrices that lie side by side, as PEFT keeps lora_B of all experts, become row-major, as `to` is. Those
// that follow each other in both go together, by vectors; where few do, as when a token meets its experts,
// element by element.
inline void take_apart(const Tensor& from, const MatrixStrides& s, Tensor& to, const MatrixPlaces& places) {
  struct Neighbours {
    int64_t from, to, count;
  };
  constexpr int64_t kEnough = 3;
  std::vector<Neighbours> found;
  for (int64_t i = 0; i < places.count(); ++i) {
    Neighbours* last = found.empty() ? nullptr : &found.back();
    const bool joins = last && last->count < kColumnsTogether && places.from[i] == last->from + last->count &&
                       places.to[i] == last->to + last->count;
    if (joins) {
      ++last->count;
    } else {
      found.push_back({places.from[i], places.to[i], 1});
    }
  }
  const auto few = [](const Neighbours& n) { return n.count < kEnough; };
  const auto first_of_many = std::stable_partition(found.begin(), found.end(), few);
  const std::vector<Neighbours> narrow(found.begin(), first_of_many), wide(first_of_many, found.end());
  const int64_t blocks = ceil_div(s.cols, kRowsTogether), size = s.rows * s.cols;
  const auto transpose_rows = kernels().transpose_rows;
  const auto by_vectors = [&](int64_t row, int64_t first, int64_t count) {
    for (const Neighbours& n : wide) {
      const TransposeParams params{address(from, n.from + row * s.row + first * s.col),
                                   dtype_of(from, "from"),
                                   count,
                                   n.count,
                                   s.col,
                                   mutable_address(to, n.to * size + row * s.cols + first),
                                   dtype_of(to, "to"),
                                   size};
      transpose_rows(params, 0, count);
    }
  };
  with_scalar_type(from.scalar_type(), [&](auto from_type) {
    with_scalar_type(to.scalar_type(), [&](auto to_type) {
      using To = decltype(to_type);
      const auto* source = from.const_data_ptr<decltype(from_type)>();
      To* target = to.mutable_data_ptr<To>();
      const auto by_elements = [&](int64_t row, int64_t col) {
        const auto* line = source + row * s.row + col * s.col;
        To* out = target + row * s.cols + col;
        for (const Neighbours& n : narrow) {
          for (int64_t i = 0; i < n.count; ++i) {
            out[(n.to + i) * size] = static_cast<To>(static_cast<float>(line[n.from + i]));
          }
        }
      };
      const auto run = [&](int64_t begin, int64_t end) {
        for (int64_t block = begin; block < end; ++block) {
          const int64_t first = block * kRowsTogether, last = std::min(first + kRowsTogether, s.cols);
          for (int64_t row = 0; row < s.rows; ++row) {
            by_vectors(row, first, last - first);
            for (int64_t col = first; col < last && !narrow.empty(); ++col) by_elements(row, col);
          }
        }
      };
      parallel_for(0, blocks, ceil_div(kElementwiseGrain / 4, kRowsTogether * s.rows * places.count()), run);
    });
  });
}

// Whatever way matrices lie.
inline void copy_each(const Tensor& from, const MatrixStrides& s, Tensor& to, const MatrixPlaces& places) {
  with_scalar_type(from.scalar_type(), [&](auto from_type) {
    with_scalar_type(to.scalar_type(), [&](auto to_type) {
      using To = decltype(to_type);
      const auto* source = from.const_data_ptr<decltype(from_type)>();
      To* target = to.mutable_data_ptr<To>();
      const auto run = [&](int64_t begin, int64_t end) {
        for (int64_t at = begin; at < end; ++at) {
          const int64_t i = at / s.rows, row = at % s.rows;
          const auto* x = source + places.from[i] * s.matrix + row * s.row;
          To* out = target + (places.to[i] * s.rows + row) * s.cols;
          for (int64_t c = 0; c < s.cols; ++c) out[c] = static_cast<To>(static_cast<float>(x[c * s.col]));
        }
      };
      parallel_for(0, places.count() * s.rows, ceil_div(kElementwiseGrain / 4, s.cols), run);
    });
  });
}

// to[places.to[i]] = from[places.from[i]] for all i, in the type of `to`, which is contiguous.
inline void copy_matrices(const Tensor& from, Tensor& to, const MatrixPlaces& places) {
  const MatrixStrides s(from);
  if (places.count() == 0 || s.rows * s.cols == 0) return;
  if (s.matrix == 1) return take_apart(from, s, to, places);
  s.row == 1 && s.rows > 1 ? transpose_each(from, s, to, places) : copy_each(from, s, to, places);
}

inline std::vector<int64_t> experts_of(const std::vector<ExpertRows>& runs) {
  std::vector<int64_t> experts;
  experts.reserve(runs.size());
  for (const ExpertRows& run : runs) experts.push_back(run.expert);
  return experts;
}

inline std::vector<int64_t> numbers_to(size_t count) {
  std::vector<int64_t> numbers(count);
  for (size_t i = 0; i < count; ++i) numbers[i] = static_cast<int64_t>(i);
  return numbers;
}

// Matrices of the experts that have rows, each row-major: in the tensor's own memory where they lie so there,
// and are of that type, else copied.
class ExpertMatrices {
 public:
  ExpertMatrices(const Tensor& t, const std::vector<ExpertRows>& runs, at::ScalarType dtype, const char* name)
      : all_(t), index_(experts_of(runs)) {
    const int64_t rows = t.size(1), cols = t.size(2);
    const bool lie_so = (cols <= 1 || t.stride(2) == 1) && (rows <= 1 || t.stride(1) == cols);
    if (!lie_so || t.scalar_type() != dtype) {
      all_ = at::empty({static_cast<int64_t>(runs.size()), rows, cols}, t.options().dtype(dtype));
      const std::vector<int64_t> numbers = numbers_to(runs.size());
      copy_matrices(t, all_, {index_, numbers});
      index_ = numbers;
    }
    dtype_ = dtype_of(all_, name);
  }

  // Of the expert of run i.
  MatrixView operator[](size_t i) const {
    return {address(all_, index_[i] * all_.stride(0)), dtype_, all_.size(2), nullptr};
  }

 private:
  Tensor all_;
  std::vector<int64_t> index_;
  DType dtype_;
};

// Gradients for all experts: those without rows have 0.
inline Tensor new_gradient(const Tensor& like, const std::vector<ExpertRows>& runs) {
  const bool all = static_cast<int64_t>(runs.size()) == like.size(0);
  return all ? at::empty(like.sizes(), like.options()) : at::zeros(like.sizes(), like.options());
}

// The gradient like `like` whose matrices come transposed, one for each run.
inline Tensor transposed_gradient(const Tensor& found, const Tensor& like,
                                  const std::vector<ExpertRows>& runs) {
  Tensor out = new_gradient(like, runs);
  copy_matrices(found.transpose(1, 2), out, {numbers_to(runs.size()), experts_of(runs)});
  return out;
}

}  // namespace peft_kernels::cpu
