// Ops without tensors that report on the library and select its instruction set: called through torch, they
// need no Python bindings. They are not kernels, hence a namespace of their own.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <cstdlib>
#include <optional>
#include <string>
#include <vector>

#include "../../common/build_info.h"
#include "../../common/checks.h"
#include "../../common/dynamic_map.h"
#include "../../common/nf4.h"
#include "kernel_table.h"
#include "namespace.h"
#include "parallel.h"

namespace peft_kernels::cpu {
namespace {

std::vector<std::string> isa_levels() {
  std::vector<std::string> names;
  for (int i = 0; i < kIsaCount; ++i) {
    if (const char* name = usable_isa_name(static_cast<Isa>(i))) names.emplace_back(name);
  }
  return names;
}

// For tests only.
std::vector<std::string> emulated_levels() {
  const char* name = usable_isa_name(Isa::kAmxEmulated);
  return name ? std::vector<std::string>{name} : std::vector<std::string>{};
}

std::optional<std::string> refused_isa() {
  const char* reason = refused_isa_reason();
  return reason ? std::optional<std::string>(reason) : std::nullopt;
}

std::string isa_level() { return isa_name(); }

void set_isa_level(std::string name) {
  if (set_isa(name.c_str())) return;
  std::string expected;
  for (const std::string& isa : isa_levels()) expected += (expected.empty() ? "" : ", ") + isa;
  TORCH_CHECK_VALUE(false, "isa level: expected one of ", expected, ", got ", name);
}

void set_isa_from_environment() {
  const char* error = select_isa_from_environment();
  TORCH_CHECK_VALUE(!error, error, ", got ", std::getenv("PEFT_KERNELS_CPU_ISA"));
}

// The kernel that serves nf4_linear with the ISA in use.
std::string linear_plan(int64_t rows, int64_t out_features, int64_t in_features, int64_t layout,
                        bool is_bf16) {
  Nf4View weight{};
  weight.block_shift = block_shift_of(layout);
  weight.codes = codes_of(layout) < kCodeKinds ? kCodeValues + codes_of(layout) : nullptr;
  GemmTerm term{};
  term.lhs_dtype = is_bf16 ? DType::kBF16 : DType::kF32;
  term.lhs_ld = term.depth = in_features;
  term.rhs = {nullptr, DType::kF32, in_features, &weight};
  const GemmParams params = one_term_params(term, rows, out_features, nullptr, DType::kF32);
  constexpr const char* kNames[] = {"dots", "gemv", "pairs", "floats"};
  return kNames[static_cast<int>(kernels().plan_nt(params))];
}

template <size_t kCount>
std::vector<double> to_vector(const float (&table)[kCount]) {
  return {table, table + kCount};
}

std::string built_for() { return spec_hash(); }
std::vector<double> nf4_code() { return to_vector(nf4::kCode); }
std::vector<double> nf4_thresholds() { return to_vector(nf4::kThresholds); }
std::vector<double> dynamic_map() { return to_vector(nf4::kDynamicMap); }
std::vector<double> unsigned_dynamic_map() { return to_vector(kUnsignedDynamicMap); }

}  // namespace

// A fragment, as TORCH_LIBRARY does not expand the macro.
TORCH_LIBRARY_FRAGMENT(PEFT_KERNELS_JOIN(PEFT_KERNELS_NAMESPACE, _library), m) {
  m.def("spec_hash() -> str", built_for);
  m.def("isa_levels() -> str[]", isa_levels);
  m.def("emulated_levels() -> str[]", emulated_levels);
  m.def("refused_isa_reason() -> str?", refused_isa);
  m.def("isa_level() -> str", isa_level);
  m.def("set_isa_level(str name) -> ()", set_isa_level);
  m.def("set_isa_from_environment() -> ()", set_isa_from_environment);
  m.def("linear_plan(int rows, int out_features, int in_features, int layout, bool is_bf16) -> str",
        linear_plan);
  m.def("is_busy() -> bool", is_busy);
  m.def("set_busy(bool? busy) -> ()", set_busy);
  m.def("nf4_code() -> float[]", nf4_code);
  m.def("nf4_thresholds() -> float[]", nf4_thresholds);
  m.def("dynamic_map() -> float[]", dynamic_map);
  m.def("unsigned_dynamic_map() -> float[]", unsigned_dynamic_map);
}

}  // namespace peft_kernels::cpu
