// Ops without tensors that report on the library, plan its kernels and set its limits. Called through torch,
// they need no Python bindings, and no device. They are not kernels, hence a namespace of their own.
#include <ATen/ATen.h>
// Ahead of all others: it is precompiled (tools/precompiled.py).

#include <torch/library.h>

#include <cstdint>
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

#define PEFT_KERNELS_QUOTE_(x) #x
#define PEFT_KERNELS_QUOTE(x) PEFT_KERNELS_QUOTE_(x)

namespace peft_kernels::cuda {
namespace {

using Names = std::tuple<std::string, std::string>;  // forward, backward
using Description = c10::Dict<std::string, int64_t>;

DType dtype_named(const std::string& name) {
  if (name == "float32") return DType::kF32;
  if (name == "bfloat16") return DType::kBF16;
  TORCH_CHECK_VALUE(name == "float16", "dtype: expected float32, bfloat16 or float16, got ", name);
  return DType::kF16;
}

Kernels kernels_named(const std::string& name) {
  if (name == "by table") return Kernels::kByTable;
  if (name == "mma.sync") return Kernels::kMmaSync;
  TORCH_CHECK_VALUE(name == "wgmma", "kernels: expected 'by table', 'mma.sync' or 'wgmma', got '", name, "'");
  return Kernels::kWgmma;
}

Card card_with(int64_t compute_capability, int64_t sms, int64_t shared_bytes, int64_t reserved_bytes) {
  return {static_cast<int>(compute_capability), static_cast<int>(sms), shared_bytes, reserved_bytes};
}

std::pair<LinearPlan, LinearPlan> plans(int64_t m, int64_t n, int64_t k, int64_t layout,
                                        const std::string& dtype, const Card& card,
                                        const std::string& kernels) {
  const int shift = block_shift_of(layout);
  const auto planned = [&](bool is_dx) {
    return codes_of(layout) == kE2M1Codes
               ? plan_scale_codes(is_dx, dtype_named(dtype), m, n, k, shift, card)
               : plan_linear(is_dx, dtype_named(dtype), m, n, k, shift, card, kernels_named(kernels));
  };
  return {planned(false), planned(true)};
}

Names names(const std::pair<LinearPlan, LinearPlan>& plans) { return {plans.first.name, plans.second.name}; }

Names plan(int64_t m, int64_t n, int64_t k, int64_t layout, std::string dtype) {
  return names(plans(m, n, k, layout, dtype, current_card(), "by table"));
}

Names plan_for(int64_t m, int64_t n, int64_t k, int64_t layout, std::string dtype, int64_t compute_capability,
               int64_t sms, int64_t shared_bytes, int64_t reserved_bytes, std::string kernels) {
  const Card card = card_with(compute_capability, sms, shared_bytes, reserved_bytes);
  return names(plans(m, n, k, layout, dtype, card, kernels));
}

Description describe(const LinearPlan& plan) {
  Description description;
  if (!plan.has_kernel()) return description;
  const Cut& cut = plan.cut;
  const Load load = plan.load();
  description.insert("tiles", cut.tiles);
  description.insert("splits", cut.splits);
  description.insert("part", cut.part);
  description.insert("blocks", cut.blocks);
  description.insert("workspace_bytes", cut.workspace_bytes);
  description.insert("features", load.features);
  description.insert("tokens", load.tokens);
  description.insert("depth", load.depth);
  description.insert("share", load.share);
  description.insert("workers", load.workers);
  return description;
}

std::tuple<Description, Description> cuts_for(int64_t m, int64_t n, int64_t k, int64_t layout,
                                              std::string dtype, int64_t compute_capability, int64_t sms,
                                              int64_t shared_bytes, int64_t reserved_bytes,
                                              std::string kernels) {
  const Card card = card_with(compute_capability, sms, shared_bytes, reserved_bytes);
  const auto [forward, backward] = plans(m, n, k, layout, dtype, card, kernels);
  return {describe(forward), describe(backward)};
}

std::string name_of(const ExpertsPlan& plan) {
  switch (plan.way) {
    case ExpertsWay::kFused:
      return plan.is_wgmma ? "wgmma" : "fused";
    case ExpertsWay::kGrouped:
      return "grouped";
    default:
      return "composed";
  }
}

Names experts_plan_on(const Card& card, int64_t rows, int64_t experts, int64_t n, int64_t k,
                      int64_t blocksize, const std::string& dtype) {
  const auto way = [&](bool is_dx) {
    const int shift = block_shift_of(blocksize);
    return name_of(plan_experts(is_dx, dtype_named(dtype), experts, rows, n, k, shift, true, card));
  };
  return {way(false), way(true)};
}

Names experts_plan(int64_t rows, int64_t experts, int64_t n, int64_t k, int64_t blocksize,
                   std::string dtype) {
  return experts_plan_on(current_card(), rows, experts, n, k, blocksize, dtype);
}

Names experts_plan_for(int64_t rows, int64_t experts, int64_t n, int64_t k, int64_t blocksize,
                       std::string dtype, int64_t compute_capability, int64_t sms, int64_t shared_bytes,
                       int64_t reserved_bytes) {
  const Card card = card_with(compute_capability, sms, shared_bytes, reserved_bytes);
  return experts_plan_on(card, rows, experts, n, k, blocksize, dtype);
}

// crossovers.Rows of Python, seven numbers each.
std::vector<Crossover> crossovers_of(const std::vector<int64_t>& numbers, const char* name) {
  constexpr size_t kCount = 7;
  TORCH_CHECK_VALUE(numbers.size() % kCount == 0, name, ": expected 7 numbers for each row, got ",
                    numbers.size());
  std::vector<Crossover> list;
  for (const int64_t* row = numbers.data(); row != numbers.data() + numbers.size(); row += kCount) {
    list.push_back({row[0], row[1], row[2], {row[3], row[4]}, {row[5], row[6]}});
  }
  return list;
}

void set_limits(int64_t compute_capability, int64_t sms, std::vector<int64_t> linear,
                std::vector<int64_t> experts) {
  const auto of_linear = crossovers_of(linear, "linear"), of_experts = crossovers_of(experts, "experts");
  const int capability = static_cast<int>(compute_capability), count = static_cast<int>(sms);
  set_crossovers(Gemms::kLinear, capability, count, of_linear);
  set_crossovers(Gemms::kExperts, capability, count, of_experts);
}

void set_off(int64_t compute_capability, int64_t sms, std::vector<std::string> kernels) {
  set_kernels_off(static_cast<int>(compute_capability), static_cast<int>(sms), std::move(kernels));
}

int64_t dequantized_piece(int64_t count, int64_t length, int64_t element_size) {
  return piece_of(count, length, element_size);
}

std::string built_for() { return spec_hash(); }

#ifdef PEFT_KERNELS_PTX
void set_simulated_card(int64_t compute_capability, int64_t sms, int64_t shared_bytes,
                        int64_t reserved_bytes) {
  set_card(card_with(compute_capability, sms, shared_bytes, reserved_bytes));
}
#else
// The runtime of another major version is another library.
__attribute__((used)) const char kCudart[] = "PEFT_KERNELS_CUDART=" PEFT_KERNELS_QUOTE(CUDART_VERSION) ";";

std::string architectures() { return PEFT_KERNELS_QUOTE(PEFT_KERNELS_CUDA_ARCHITECTURES); }
#endif

// Shared memory that the system reserves in each block, on all cards so far: 1024.
#define PEFT_KERNELS_CARD "int compute_capability, int sms, int shared_bytes, int reserved_bytes=1024"

}  // namespace

// A fragment, as TORCH_LIBRARY does not expand the macro.
TORCH_LIBRARY_FRAGMENT(PEFT_KERNELS_JOIN(PEFT_KERNELS_NAMESPACE, _library), m) {
  m.def("spec_hash() -> str", built_for);
  // The kernels that [m, k] x [n, k]^T and its gradient use: on the current device, or on any card.
  // `kernels`: "by table", or "mma.sync" or "wgmma" for any number of rows.
  m.def("plan(int m, int n, int k, int layout, str dtype) -> (str, str)", plan);
  m.def("plan_for(int m, int n, int k, int layout, str dtype, " PEFT_KERNELS_CARD
        ", str kernels='by table') -> (str, str)",
        plan_for);
  // How each of these is partitioned, and the load of the busiest worker: Cut and Load in linear.h. Empty
  // where there is no kernel.
  m.def("cuts_for(int m, int n, int k, int layout, str dtype, " PEFT_KERNELS_CARD
        ", str kernels='mma.sync') -> (Dict(str, int), Dict(str, int))",
        cuts_for);
  // How a grouped GEMM with `rows` rows of all experts and its gradient are computed: ExpertsWay in
  // experts.h.
  m.def("experts_plan(int rows, int experts, int n, int k, int blocksize, str dtype) -> (str, str)",
        experts_plan);
  m.def("experts_plan_for(int rows, int experts, int n, int k, int blocksize, str dtype, " PEFT_KERNELS_CARD
        ") -> (str, str)",
        experts_plan_for);
  m.def("set_limits(int compute_capability, int sms, int[] linear, int[] experts) -> ()", set_limits);
  m.def("set_kernels_off(int compute_capability, int sms, str[] kernels) -> ()", set_off);
  // Rows or columns of a weight that are dequantised at a time: linear.h.
  m.def("piece_of(int count, int length, int element_size) -> int", dequantized_piece);
#ifdef PEFT_KERNELS_PTX
  m.def("set_card(" PEFT_KERNELS_CARD ") -> ()", set_simulated_card);
  m.def("set_capturing(bool value) -> ()", set_capturing);
  m.def("set_logit_bytes(int bytes) -> ()", set_logit_bytes);
  m.def("set_experts_piece_bytes(int bytes) -> ()", set_experts_piece_bytes);
  m.def("logit_chunk(int count, int length, int element_size) -> int", logit_chunk);
#else
  // What the kernels are compiled for, in the words of peft_kernels/core/backends/architectures.py, separated
  // by colons.
  m.def("architectures() -> str", architectures);
#endif
}

}  // namespace peft_kernels::cuda
