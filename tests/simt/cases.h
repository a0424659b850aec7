// What test_emulator.py runs, by name. A case that finds something wrong throws.
#pragma once

#include <functional>
#include <map>
#include <stdexcept>
#include <string>

namespace peft_kernels::cuda {

using Cases = std::map<std::string, std::function<void()>>;

const Cases& thread_faults();    // kernels with planted faults: NAME-broken and NAME-fixed
const Cases& memory_faults();    // more of them
const Cases& primitive_cases();  // the wrappers against plain C++
const Cases& memory_cases();     // memory, bank conflicts, blocks

inline void expect(bool holds, const std::string& what) {
  if (!holds) throw std::runtime_error("expected: " + what);
}

}  // namespace peft_kernels::cuda
