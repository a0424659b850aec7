// Small matrices of experts, the adapters and their gradients, moved between layouts: those of the experts
// that have rows, and no others.
#pragma once

#include <vector>

#include "experts_args.h"

namespace peft_kernels::cpu {

// Elements from one to the next.
struct MatrixStrides {
  int64_t matrix, row, col;
};

inline MatrixStrides strides_of(const Tensor& t) { return {t.stride(0), t.stride(1), t.stride(2)}; }
inline MatrixStrides transposed(MatrixStrides s) { return {s.matrix, s.col, s.row}; }

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

// to[to_index[i]] = from[from_index[i]], matrices of rows by cols, for all i.
inline void copy_matrices(const Tensor& from, MatrixStrides from_strides,
                          const std::vector<int64_t>& from_index, Tensor& to, MatrixStrides to_strides,
                          const std::vector<int64_t>& to_index, int64_t rows, int64_t cols) {
  const int64_t count = static_cast<int64_t>(from_index.size());
  with_scalar_type(from.scalar_type(), [&](auto from_type) {
    with_scalar_type(to.scalar_type(), [&](auto to_type) {
      using To = decltype(to_type);
      const auto* source = from.const_data_ptr<decltype(from_type)>();
      To* target = to.mutable_data_ptr<To>();
      const auto copy = [&](int64_t i, int64_t row, int64_t col) {
        target[to_index[i] * to_strides.matrix + row * to_strides.row + col * to_strides.col] =
            static_cast<To>(static_cast<float>(source[from_index[i] * from_strides.matrix +
                                                      row * from_strides.row + col * from_strides.col]));
      };
      // PEFT keeps lora_B of all experts as one matrix in which they lie side by side: one line has an
      // element of each.
      const bool side_by_side = from_strides.matrix < std::min(from_strides.row, from_strides.col);
      const int64_t outer = side_by_side ? rows : count * rows, inner = side_by_side ? count * cols : cols;
      const int64_t grain = ceil_div(kElementwiseGrain / 4, std::max<int64_t>(inner, 1));
      parallel_for(0, outer, grain, [&](int64_t begin, int64_t end) {
        for (int64_t at = begin; at < end; ++at) {
          for (int64_t col = 0; col < cols; ++col) {
            if (!side_by_side) {
              copy(at / rows, at % rows, col);
              continue;
            }
            for (int64_t i = 0; i < count; ++i) copy(i, at, col);
          }
        }
      });
    });
  });
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

// The adapters of the experts that have rows, each row-major: in the tensor's own memory where they lie so
// there, else copied.
class ExpertMatrices {
 public:
  ExpertMatrices(const Tensor& t, const std::vector<ExpertRows>& runs, const char* name)
      : all_(t), index_(experts_of(runs)), dtype_(dtype_of(t, name)) {
    const int64_t rows = t.size(1), cols = t.size(2);
    if ((cols <= 1 || t.stride(2) == 1) && (rows <= 1 || t.stride(1) == cols)) return;
    all_ = at::empty({static_cast<int64_t>(runs.size()), rows, cols}, t.options());
    const std::vector<int64_t> numbers = numbers_to(runs.size());
    copy_matrices(t, strides_of(t), index_, all_, strides_of(all_), numbers, rows, cols);
    index_ = numbers;
  }

  // Those of the runs alone, row-major.
  explicit ExpertMatrices(const Tensor& of_runs)
      : all_(of_runs), index_(numbers_to(of_runs.size(0))), dtype_(dtype_of(of_runs, "matrices")) {}

  // Of the expert of run i.
  MatrixView operator[](size_t i) const {
    const int64_t bytes = index_[i] * all_.stride(0) * static_cast<int64_t>(all_.element_size());
    return {static_cast<const char*>(all_.const_data_ptr()) + bytes, dtype_, all_.size(2), nullptr};
  }

 private:
  Tensor all_;
  std::vector<int64_t> index_;
  DType dtype_;
};

// In fp32, and transposed; those of experts without rows are left out.
inline Tensor transposed_floats(const Tensor& t, const std::vector<ExpertRows>& runs) {
  const int64_t rows = t.size(1), cols = t.size(2);
  Tensor out = at::empty({static_cast<int64_t>(runs.size()), cols, rows}, t.options().dtype(at::kFloat));
  copy_matrices(t, strides_of(t), experts_of(runs), out, transposed(strides_of(out)), numbers_to(runs.size()),
                rows, cols);
  return out;
}

// Gradients for all experts: those without rows have 0.
inline Tensor new_gradient(const Tensor& like, const std::vector<ExpertRows>& runs) {
  const bool all = static_cast<int64_t>(runs.size()) == like.size(0);
  return all ? at::empty(like.sizes(), like.options()) : at::zeros(like.sizes(), like.options());
}

// The gradient like `like` whose matrices come transposed, one for each run.
inline Tensor transposed_gradient(const Tensor& found, const Tensor& like,
                                  const std::vector<ExpertRows>& runs) {
  Tensor out = new_gradient(like, runs);
  copy_matrices(found, transposed(strides_of(found)), numbers_to(runs.size()), out, strides_of(out),
                experts_of(runs), like.size(1), like.size(2));
  return out;
}

}  // namespace peft_kernels::cpu
