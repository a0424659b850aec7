// The Python module: what is not an op. Importing it registers the ops (*_ops.cpp) and chooses the level.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "../common/built_for.h"
#include "../common/dynamic_map.h"
#include "../common/nf4.h"
#include "isa.h"

namespace {

using namespace peft_kernels;

std::vector<std::string> isa_levels() {
  std::vector<std::string> levels;
  for (int i = 0; i < cpu::kIsaCount; ++i) {
    if (const char* name = cpu::usable_isa_name(static_cast<cpu::Isa>(i))) levels.emplace_back(name);
  }
  return levels;
}

std::vector<std::string> emulated_levels() {
  const char* name = cpu::usable_isa_name(cpu::Isa::kAmxEmulated);
  return name ? std::vector<std::string>{name} : std::vector<std::string>{};
}

void set_isa_level(const std::string& name) {
  if (cpu::set_isa(name.c_str())) return;
  std::string expected;
  for (const std::string& level : isa_levels()) expected += (expected.empty() ? "" : ", ") + level;
  throw pybind11::value_error("isa level: expected one of " + expected + ", got " + name);
}

// The kernel that serves nf4_linear at the level in use.
std::string linear_plan(int64_t rows, int64_t out_features, int64_t in_features, int blocksize,
                        bool is_bf16) {
  cpu::Nf4View weight{};
  while (int64_t{1} << weight.block_shift < blocksize) ++weight.block_shift;
  cpu::GemmTerm term{};
  term.lhs_dtype = is_bf16 ? DType::kBF16 : DType::kF32;
  term.lhs_ld = term.depth = in_features;
  term.rhs = {nullptr, DType::kF32, in_features, &weight};
  cpu::GemmParams params{};
  params.terms = &term;
  params.term_count = 1;
  params.m = rows;
  params.n = out_features;
  constexpr const char* kNames[] = {"dots", "gemv", "pairs", "floats"};
  return kNames[static_cast<int>(cpu::kernels().plan_nt(params))];
}

template <size_t kCount>
std::vector<float> to_vector(const float (&table)[kCount]) {
  return {table, table + kCount};
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  if (const char* error = cpu::select_isa_from_environment()) {
    throw std::runtime_error(std::string(error) + ", got " + std::getenv("PEFT_KERNELS_CPU_ISA"));
  }
  m.def("isa_levels", isa_levels, "Levels that this machine can run, ascending.");
  m.def("emulated_levels", emulated_levels, "Further ones, for tests only.");
  m.def("refused_isa_reason", cpu::refused_isa_reason,
        "Why the processor's best level is not used, or None.");
  m.def("isa_level", cpu::isa_name, "The level in use.");
  m.def("set_isa_level", set_isa_level, "Choose a level for every later call in this process.");
  m.def("linear_plan", linear_plan, "Kernel of nf4_linear: dots, gemv, pairs or floats.",
        pybind11::arg("rows"), pybind11::arg("out_features"), pybind11::arg("in_features"),
        pybind11::arg("blocksize"), pybind11::arg("is_bf16"));
  m.def("nf4_code", [] { return to_vector(nf4::kCode); });
  m.def("nf4_thresholds", [] { return to_vector(nf4::kThresholds); });
  m.def("dynamic_map", [] { return to_vector(nf4::kDynamicMap); });
  m.def("unsigned_dynamic_map", [] { return to_vector(kUnsignedDynamicMap); });
  m.def("spec_hash", [] { return std::string(spec_hash()); }, "SHA-256 of the schemas built against.");
}
