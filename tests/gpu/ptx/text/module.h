// The PTX module of one fat binary: its variables and kernels.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "fault.h"
#include "instruction.h"
#include "lines.h"

namespace ptx {

class Module {
 public:
  explicit Module(std::string_view text);

  Entry& entry(const std::string& name);  // throws Fault
  void read(Entry& entry);                // its body, unless already read

  // A module-level variable.
  struct Global {
    enum class Space : uint8_t { kConstant, kGlobal, kShared, kDynamicShared } space;
    int64_t offset;  // in `constants`, in `globals`, or in shared memory
  };
  const Global* find(std::string_view name) const;

  int target = 0;
  bool is_for_one_architecture = false;  // sm_90a
  Lines lines;
  std::vector<std::byte> constants;  // what ld.const reads
  std::vector<std::byte> globals;
  int64_t shared_bytes = 0;  // static, of variables outside of kernels
  std::vector<std::unique_ptr<Entry>> entries;

 private:
  void read_variable(class Scanner& scanner, Global::Space space);
  void read_entry(class Scanner& scanner);

  std::string text_;
  std::unordered_map<std::string_view, Global> variables_;
};

// A kernel's name as faults show it: `void a::b<C>(D)` as b<C>, and launch.cuh's entry<Kernel> as Kernel.
std::string readable(const std::string& entry);

// Makes the instructions of an Entry from its body (instructions/decode.cpp). Throws Fault.
void decode(Module& module, Entry& entry);

}  // namespace ptx
