// Converts the small matrices of experts, adapters and their gradients, between layouts, only for experts
// that have rows.
#pragma once

#include <algorithm>
#include <type_traits>
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

// Calls body with typed pointers to the elements of both tensors.
template <class Body>
void with_pointers(const Tensor& from, Tensor& to, const Body& body) {
  with_scalar_type(from.scalar_type(), [&](auto from_type) {
    with_scalar_type(to.scalar_type(), [&](auto to_type) {
      body(from.const_data_ptr<decltype(from_type)>(), to.mutable_data_ptr<decltype(to_type)>());
    });
  });
}

// Strides of the matrices in a tensor of three dimensions. Matrices of one row or column are reinterpreted in
// the simplest layout.
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

// Which matrices of one tensor are copied to which of another.
struct MatrixPlaces {
  std::vector<int64_t> from, to;
  int64_t count() const { return static_cast<int64_t>(from.size()); }
};

// Matrices, or columns, processed together: as many as share a cache line.
inline constexpr int64_t kColumnsTogether = 16, kRowsTogether = 4 * kTransposeRows;

// Makes matrices with contiguous columns row-major, like `to`.
inline void transpose_each(const Tensor& from, const MatrixStrides& s, Tensor& to,
                           const MatrixPlaces& places) {
  const int64_t blocks = ceil_div(s.cols, kRowsTogether), size = s.rows * s.cols;
  const auto transpose_rows = kernels().transpose_rows;
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t i = task / blocks, first = task % blocks * kRowsTogether;
      const TransposeParams params{
          element_ptr(from, places.from[i] * s.matrix), dtype_of(from, "from"), s.cols, s.rows, s.col,
          mutable_element_ptr(to, places.to[i] * size), dtype_of(to, "to"),     s.cols};
      transpose_rows(params, first, std::min(first + kRowsTogether, s.cols));
    }
  };
  parallel_for(0, places.count() * blocks, ceil_div(kElementwiseGrain, kRowsTogether * s.rows), run);
}

// Makes interleaved matrices, as PEFT stores lora_B of all experts, row-major, like `to`. Matrices that are
// neighbours in both tensors are transposed together in vectors; with few neighbours, as when one token meets
// its experts, elements are copied one by one.
inline void deinterleave(const Tensor& from, const MatrixStrides& s, Tensor& to, const MatrixPlaces& places) {
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
      const TransposeParams params{element_ptr(from, n.from + row * s.row + first * s.col),
                                   dtype_of(from, "from"),
                                   count,
                                   n.count,
                                   s.col,
                                   mutable_element_ptr(to, n.to * size + row * s.cols + first),
                                   dtype_of(to, "to"),
                                   size};
      transpose_rows(params, 0, count);
    }
  };
  with_pointers(from, to, [&](const auto* source, auto* target) {
    using To = std::remove_pointer_t<decltype(target)>;
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
}

// For any other layout.
inline void copy_each(const Tensor& from, const MatrixStrides& s, Tensor& to, const MatrixPlaces& places) {
  with_pointers(from, to, [&](const auto* source, auto* target) {
    using To = std::remove_pointer_t<decltype(target)>;
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
}

// to[places.to[i]] = from[places.from[i]] for all i, in the dtype of `to`, which is contiguous.
inline void copy_matrices(const Tensor& from, Tensor& to, const MatrixPlaces& places) {
  const MatrixStrides s(from);
  if (places.count() == 0 || s.rows * s.cols == 0) return;
  if (s.matrix == 1) return deinterleave(from, s, to, places);
  s.row == 1 && s.rows > 1 ? transpose_each(from, s, to, places) : copy_each(from, s, to, places);
}

inline std::vector<int64_t> experts_of(const std::vector<ExpertRows>& runs) {
  std::vector<int64_t> experts;
  experts.reserve(runs.size());
  for (const ExpertRows& run : runs) experts.push_back(run.expert);
  return experts;
}

inline std::vector<int64_t> index_range(size_t count) {
  std::vector<int64_t> indices(count);
  for (size_t i = 0; i < count; ++i) indices[i] = static_cast<int64_t>(i);
  return indices;
}

// The matrices of the experts that have rows, row-major in `dtype`: in place if the tensor is already so,
// else copied.
class ExpertMatrices {
 public:
  ExpertMatrices(const Tensor& t, const std::vector<ExpertRows>& runs, at::ScalarType dtype, const char* name)
      : all_(t), index_(experts_of(runs)) {
    const int64_t rows = t.size(1), cols = t.size(2);
    const bool is_row_major = (cols <= 1 || t.stride(2) == 1) && (rows <= 1 || t.stride(1) == cols);
    if (!is_row_major || t.scalar_type() != dtype) {
      all_ = at::empty({static_cast<int64_t>(runs.size()), rows, cols}, t.options().dtype(dtype));
      const std::vector<int64_t> indices = index_range(runs.size());
      copy_matrices(t, all_, {index_, indices});
      index_ = indices;
    }
    dtype_ = dtype_of(all_, name);
  }

  // Of the expert of run i.
  MatrixView operator[](size_t i) const {
    return {element_ptr(all_, index_[i] * all_.stride(0)), dtype_, all_.size(2), nullptr};
  }

 private:
  Tensor all_;
  std::vector<int64_t> index_;
  DType dtype_;
};

// Gradients for all experts, 0 for those without rows.
inline Tensor new_gradient(const Tensor& like, const std::vector<ExpertRows>& runs) {
  const bool all = static_cast<int64_t>(runs.size()) == like.size(0);
  return all ? at::empty(like.sizes(), like.options()) : at::zeros(like.sizes(), like.options());
}

// The gradient shaped like `like` from transposed matrices, one per run.
inline Tensor transposed_gradient(const Tensor& found, const Tensor& like,
                                  const std::vector<ExpertRows>& runs) {
  Tensor out = new_gradient(like, runs);
  copy_matrices(found.transpose(1, 2), out, {index_range(runs.size()), experts_of(runs)});
  return out;
}

}  // namespace peft_kernels::cpu
