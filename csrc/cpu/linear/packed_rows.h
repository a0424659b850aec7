// Activations packed for gemm_packed, one block of rows at a time: a packed copy of all rows would be fresh
// memory, and touching that costs more than packing.
#pragma once

#include <ATen/ATen.h>

#include <utility>
#include <vector>

#include "../../common/checks.h"
#include "../core/parallel.h"

namespace peft_kernels::cpu {

// Rows that are packed together.
inline int64_t block_rows(NtPlan plan) { return plan == NtPlan::kPairs ? 1024 : 256; }

// Packed rows start at multiples of this: no ISA has more lanes.
inline constexpr int64_t kPackAlign = 16;

inline int64_t packed_depth(int64_t depth) { return ceil_div(depth, kPackDepth) * kPackDepth; }

// A buffer for `rows` packed rows.
inline Tensor packed_buffer(int64_t rows, int64_t depth, NtPlan plan, const at::TensorOptions& options) {
  const auto dtype = plan == NtPlan::kPairs ? at::kBFloat16 : at::kFloat;
  return at::empty({ceil_div(rows, kPackAlign) * kPackAlign * packed_depth(depth)}, options.dtype(dtype));
}

// Packs rows of one depth.
inline void pack_rows(const PackParams* packs, size_t count) {
  if (count == 0) return;
  int64_t strips = 0;
  for (size_t i = 0; i < count; ++i) strips += ceil_div(packs[i].rows, kPackRows);
  const auto pack_strips = kernels().pack_strips;
  const int64_t grain = ceil_div(kElementwiseGrain, kPackRows * packed_depth(packs[0].depth));
  parallel_for(0, strips, grain, [&](int64_t first, int64_t last) {
    for (const PackParams* pack = packs; last > 0; ++pack) {
      const int64_t strips_here = ceil_div(pack->rows, kPackRows);
      if (first < strips_here) pack_strips(*pack, first, std::min(last, strips_here));
      first = std::max<int64_t>(first - strips_here, 0);
      last -= strips_here;
    }
  });
}

// The rows of one GEMM, which others may share.
class Rows {
 public:
  explicit Rows(Tensor rows) : rows_(std::move(rows)) {}
  const Tensor& tensor() const { return rows_; }

  // Rows [begin, begin + block_rows), packed.
  const void* packed(int64_t begin, NtPlan plan) const {
    if (begin == packed_begin_ && plan == plan_) return packed_.const_data_ptr();
    const int64_t rows = std::min(block_rows(plan), rows_of(rows_) - begin), depth = rows_.size(-1);
    if (!packed_.defined() || plan != plan_) packed_ = packed_buffer(rows, depth, plan, rows_.options());
    const PackParams params{element_ptr(rows_, begin * depth), dtype_of(rows_, "x"), rows, depth, plan,
                            packed_.mutable_data_ptr()};
    pack_rows(&params, 1);
    packed_begin_ = begin;
    plan_ = plan;
    return params.out;
  }

 private:
  Tensor rows_;
  mutable Tensor packed_;
  mutable NtPlan plan_ = NtPlan::kDots;
  mutable int64_t packed_begin_ = -1;
};

// Rows of many GEMMs, packed side by side until the block is full.
class PackedBlocks {
 public:
  // For GEMMs with `rows` rows in all, each count rounded up to kPackAlign.
  PackedBlocks(int64_t rows, int64_t depth, NtPlan plan, const at::TensorOptions& options)
      : rows_(std::min(rows, block_rows(plan))),
        depth_(depth),
        plan_(plan),
        buffer_(packed_buffer(rows_, depth, plan, options)) {}

  bool fits(int64_t rows) const { return used_ + rows <= ceil_div(rows_, kPackAlign) * kPackAlign; }
  // Schedules the rows of x, `depth` apart, and returns where they will be packed.
  const void* add(const void* x, DType dtype, int64_t rows) {
    void* out = mutable_element_ptr(buffer_, used_ * packed_depth(depth_));
    packs_.push_back({x, dtype, rows, depth_, plan_, out});
    used_ += ceil_div(rows, kPackAlign) * kPackAlign;
    return out;
  }
  void pack() const { pack_rows(packs_.data(), packs_.size()); }
  void clear() {
    packs_.clear();
    used_ = 0;
  }

 private:
  int64_t rows_, depth_;
  NtPlan plan_;
  Tensor buffer_;
  std::vector<PackParams> packs_;
  int64_t used_ = 0;
};

}  // namespace peft_kernels::cpu
