// The Python module: plans and build information. Importing it registers the ops (*_ops.cpp) and needs no
// device.
#include <ATen/ATen.h>
// Ahead of all others: it is precompiled (tools/precompiled.py).

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "../common/build_info.h"
#include "core/runtime.h"
#include "experts/experts.h"
#include "experts/experts_grouped.h"
#include "linear/crossovers.h"
#include "linear/linear.h"
#include "loss/cross_entropy_head.h"

#ifdef PEFT_KERNELS_PTX
#  include "bind.h"
#endif

#define PEFT_KERNELS_QUOTE_(x) #x
#define PEFT_KERNELS_QUOTE(x) PEFT_KERNELS_QUOTE_(x)

namespace {

using namespace peft_kernels;
using pybind11::arg;

// Shared memory that the system reserves in each block, on all cards so far.
constexpr int64_t kReserved = 1024;

DType dtype_named(const std::string& name) {
  if (name == "float32") return DType::kF32;
  if (name == "bfloat16") return DType::kBF16;
  if (name == "float16") return DType::kF16;
  throw pybind11::value_error("dtype: expected float32, bfloat16 or float16, got " + name);
}

cuda::Kernels kernels_named(const std::string& name) {
  if (name == "by table") return cuda::Kernels::kByTable;
  if (name == "mma.sync") return cuda::Kernels::kMmaSync;
  if (name == "wgmma") return cuda::Kernels::kWgmma;
  throw pybind11::value_error("kernels: expected 'by table', 'mma.sync' or 'wgmma', got '" + name + "'");
}

using Plans = std::pair<cuda::LinearPlan, cuda::LinearPlan>;
using Paths = std::pair<std::string, std::string>;

// Forward and backward.
Plans plans(int64_t m, int64_t n, int64_t k, int64_t blocksize, const std::string& dtype,
            const cuda::Card& card, const std::string& kernels) {
  const auto planned = [&](bool is_dx) {
    return cuda::plan_linear(is_dx, dtype_named(dtype), m, n, k, block_shift_of(blocksize), card,
                             kernels_named(kernels));
  };
  return {planned(false), planned(true)};
}
Paths names(const Plans& plans) { return {plans.first.name, plans.second.name}; }

std::string name_of(const cuda::ExpertsPlan& plan) {
  switch (plan.way) {
    case cuda::ExpertsWay::kFused:
      return plan.is_wgmma ? "wgmma" : "fused";
    case cuda::ExpertsWay::kGrouped:
      return "grouped";
    default:
      return "composed";
  }
}

Paths experts_plan(int64_t rows, int64_t experts, int64_t n, int64_t k, int64_t blocksize,
                   const std::string& dtype, const cuda::Card& card) {
  const auto way = [&](bool is_dx) {
    const int shift = block_shift_of(blocksize);
    return name_of(cuda::plan_experts(is_dx, dtype_named(dtype), experts, rows, n, k, shift, true, card));
  };
  return {way(false), way(true)};
}

// crossovers.Rows of Python.
using Range = std::pair<int64_t, int64_t>;
using Rows = std::vector<std::tuple<int64_t, int64_t, int64_t, Range, Range>>;

std::vector<cuda::Crossover> crossovers_of(const Rows& rows) {
  std::vector<cuda::Crossover> list;
  for (const auto& [weights, forward, backward, forward_wgmma, backward_wgmma] : rows) {
    list.push_back({weights,
                    forward,
                    backward,
                    {forward_wgmma.first, forward_wgmma.second},
                    {backward_wgmma.first, backward_wgmma.second}});
  }
  return list;
}

std::map<std::string, int64_t> describe(const cuda::LinearPlan& plan) {
  if (!plan.has_kernel()) return {};
  const cuda::Cut& cut = plan.cut;
  const cuda::Load load = plan.load();
  return {{"tiles", cut.tiles},
          {"splits", cut.splits},
          {"part", cut.part},
          {"blocks", cut.blocks},
          {"workspace_bytes", cut.workspace_bytes},
          {"features", load.features},
          {"tokens", load.tokens},
          {"depth", load.depth},
          {"share", load.share},
          {"workers", load.workers}};
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("spec_hash", [] { return std::string(spec_hash()); }, "SHA-256 of the schemas built against.");
  m.def(
      "plan",
      [](int64_t m, int64_t n, int64_t k, int64_t blocksize, const std::string& dtype) {
        return names(plans(m, n, k, blocksize, dtype, cuda::current_card(), "by table"));
      },
      "The kernels that [m, k] x [n, k]^T and its gradient use on the current device.");
  m.def(
      "plan_for",
      [](int64_t m, int64_t n, int64_t k, int64_t blocksize, const std::string& dtype, int compute_capability,
         int sms, int64_t shared_bytes, int64_t reserved_bytes, const std::string& kernels) {
        const cuda::Card card{compute_capability, sms, shared_bytes, reserved_bytes};
        return names(plans(m, n, k, blocksize, dtype, card, kernels));
      },
      "The same for any card. kernels: 'by table', or 'mma.sync' or 'wgmma' for any number of rows.",
      arg("m"), arg("n"), arg("k"), arg("blocksize"), arg("dtype"), arg("compute_capability"), arg("sms"),
      arg("shared_bytes"), arg("reserved_bytes") = kReserved, arg("kernels") = "by table");
  m.def(
      "experts_plan",
      [](int64_t rows, int64_t experts, int64_t n, int64_t k, int64_t blocksize, const std::string& dtype) {
        return experts_plan(rows, experts, n, k, blocksize, dtype, cuda::current_card());
      },
      "How a grouped GEMM with `rows` rows of all experts and its gradient are computed on the current "
      "device: see ExpertsWay in experts.h.");
  m.def(
      "experts_plan_for",
      [](int64_t rows, int64_t experts, int64_t n, int64_t k, int64_t blocksize, const std::string& dtype,
         int compute_capability, int sms, int64_t shared_bytes, int64_t reserved_bytes) {
        return experts_plan(rows, experts, n, k, blocksize, dtype,
                            {compute_capability, sms, shared_bytes, reserved_bytes});
      },
      "The same for any card.", arg("rows"), arg("experts"), arg("n"), arg("k"), arg("blocksize"),
      arg("dtype"), arg("compute_capability"), arg("sms"), arg("shared_bytes"),
      arg("reserved_bytes") = kReserved);
  m.def(
      "cuts_for",
      [](int64_t m, int64_t n, int64_t k, int64_t blocksize, const std::string& dtype, int compute_capability,
         int sms, int64_t shared_bytes, int64_t reserved_bytes, const std::string& kernels) {
        const cuda::Card card{compute_capability, sms, shared_bytes, reserved_bytes};
        const auto [forward, backward] = plans(m, n, k, blocksize, dtype, card, kernels);
        return std::pair{describe(forward), describe(backward)};
      },
      "How each of these is partitioned, and the load of the busiest worker: see Cut and Load in linear.h. "
      "Empty where there is no kernel.",
      arg("m"), arg("n"), arg("k"), arg("blocksize"), arg("dtype"), arg("compute_capability"), arg("sms"),
      arg("shared_bytes"), arg("reserved_bytes") = kReserved, arg("kernels") = "mma.sync");
  m.def(
      "set_limits",
      [](int compute_capability, int sms, const Rows& linear, const Rows& experts) {
        cuda::set_crossovers(cuda::Gemms::kLinear, compute_capability, sms, crossovers_of(linear));
        cuda::set_crossovers(cuda::Gemms::kExperts, compute_capability, sms, crossovers_of(experts));
      },
      "Sets crossovers.Rows of cards: see crossovers.h.", arg("compute_capability"), arg("sms"),
      arg("linear"), arg("experts") = Rows{});
  m.def(
      "piece_of",
      [](int64_t count, int64_t length, int64_t element_size) {
        return cuda::piece_of(count, length, element_size);
      },
      "Rows or columns of a weight that are dequantised at a time: see linear.h.");
#ifdef PEFT_KERNELS_PTX
  m.def(
      "set_card",
      [](int compute_capability, int sms, int64_t shared_bytes, int64_t reserved_bytes) {
        cuda::set_card({compute_capability, sms, shared_bytes, reserved_bytes});
      },
      "The card that kernels are planned for.", arg("compute_capability"), arg("sms"), arg("shared_bytes"),
      arg("reserved_bytes") = kReserved);
  m.def("set_capturing", cuda::set_capturing, "Whether calls act as if captured into a CUDA graph.");
  m.def("set_logit_bytes", cuda::set_logit_bytes, "The logits that a loss computes at a time, in bytes.");
  m.def("set_experts_piece_bytes", cuda::set_experts_piece_bytes, "See kPieceBytes in experts_grouped.h.");
  m.def("logit_chunk", cuda::logit_chunk, "See cross_entropy_head.h.");
  cudart::bind(m);
#else
  m.def(
      "architectures", [] { return std::string(PEFT_KERNELS_QUOTE(PEFT_KERNELS_CUDA_ARCHITECTURES)); },
      "The architectures that the kernels are compiled for, in the format of "
      "peft_kernels/core/backends/architectures.py, separated by colons.");
#endif
}
