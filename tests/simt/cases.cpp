// cases NAME SEED: runs one case, prints what it threw, or "clean".
#include "cases.h"

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>

#include "emulator.h"

namespace peft_kernels::cuda {
namespace {

std::string outcome(const std::function<void()>& run) {
  try {
    run();
  } catch (const std::exception& error) {
    return error.what();
  }
  return "clean";
}

Cases all_faults() {
  Cases all = thread_faults();
  all.insert(memory_faults().begin(), memory_faults().end());
  return all;
}

// Every fault in one process, each followed by a clean launch.
void survive_faults() {
  const Cases faults = all_faults();
  for (const auto& [name, run] : faults) {
    if (name == "global_out_of_bounds-broken") continue;
    const bool broken = name.find("-broken") != std::string::npos;
    expect((outcome(run) == "clean") != broken, name + " after other faults as alone");
    for (const auto& fixed : {"copy_read_early-fixed", "ticket_too_early-fixed"}) {
      expect(outcome(faults.at(fixed)) == "clean", std::string(fixed) + " to be clean after " + name);
    }
  }
}

int main(int count, char** arguments) {
  if (count != 3) return 2;
  const std::string name = arguments[1];
  simt::set_seed(std::strtoull(arguments[2], nullptr, 10));
  Cases cases = all_faults();
  cases["survive_faults"] = survive_faults;
  cases.insert(primitive_cases().begin(), primitive_cases().end());
  cases.insert(memory_cases().begin(), memory_cases().end());
  const auto found = cases.find(name);
  if (found == cases.end()) return 2;
  std::puts(outcome(found->second).c_str());
  return 0;
}

}  // namespace
}  // namespace peft_kernels::cuda

int main(int count, char** arguments) { return peft_kernels::cuda::main(count, arguments); }
