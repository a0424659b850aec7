#include "cudart_bind.h"

#include <pybind11/functional.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cases.cuh"
#include "cudart.h"

namespace peft_kernels::cudart {
namespace {

const cases::Cases& all_cases() {
  static const cases::Cases all = [] {
    cases::Cases found;
    for (const auto* group :
         {&cases::thread_faults(), &cases::memory_faults(), &cases::block_faults(), &cases::value_cases(),
          &cases::matrix_cases(), &cases::memory_cases(), &cases::machine_cases()}) {
      found.insert(group->begin(), group->end());
    }
    return found;
  }();
  return all;
}

}  // namespace

void bind(pybind11::module_& m) {
  m.def("set_seed", [](uint32_t seed) { ptx::options().seed = seed; }, "Of the order in which warps run.");
  m.def(
      "set_resident_blocks", [](int blocks) { ptx::options().resident_blocks = blocks; },
      "How many blocks run at a time; 0: by the seed.");
  m.def(
      "set_truncate_sums", [](bool truncate) { ptx::options().truncate_sums = truncate; },
      "Whether matrix instructions cut their sums off, as tensor cores do.");
  m.def(
      "set_perturb_approximations", [](bool perturb) { ptx::options().perturb_approximations = perturb; },
      "Whether what .approx instructions give is moved within their error.");
  m.def(
      "set_edit",
      [](const std::optional<std::function<std::string(std::string)>>& edit) {
        set_edit(edit ? *edit : nullptr);
      },
      "What to make of the PTX before it runs; None: nothing.");
  m.def("set_sticky_error", set_sticky_error, "An error that every call of CUDA's returns; 0: none.");
  m.def(
      "bank_counts",
      [] {
        std::map<std::string, std::tuple<int64_t, int64_t, int64_t>> counts;
        for (const auto& [line, count] : ptx::bank_counts()) {
          counts[line] = {count.accesses, count.wavefronts, count.conflicts};
        }
        return counts;
      },
      "By line: warp-wide accesses to shared memory, their wavefronts, and those of them that are "
      "conflicts.");
  m.def("reset_bank_counts", ptx::reset_bank_counts, "");
  m.def(
      "executed",
      [] {
        using Instruction = std::tuple<std::string, std::string, std::string, uint64_t>;
        std::map<int, std::pair<std::vector<Instruction>, std::vector<std::string>>> result;
        for (Executed& one : executed()) {
          auto& [instructions, never_run] = result[one.architecture];
          never_run = one.never_run;
          for (ptx::Executed& i : one.instructions) {
            instructions.emplace_back(std::move(i.entry), std::move(i.line), std::move(i.text), i.times);
          }
        }
        return result;
      },
      "By architecture: the instructions of all kernels that ran, as (kernel, line, text, how often), and "
      "the "
      "kernels that did not.");
  m.def(
      "cases",
      [] {
        std::vector<std::string> names;
        for (const auto& [name, run] : all_cases()) names.push_back(name);
        return names;
      },
      "The kernels of tests/ptx/*.cu.");
  m.def("run_case", [](const std::string& name) { all_cases().at(name)(); }, "Raises what the case throws.");
}

}  // namespace peft_kernels::cudart
