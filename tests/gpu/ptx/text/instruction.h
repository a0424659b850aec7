// A kernel as it is run: one Instruction for each of the PTX, with every name resolved.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace ptx {

inline constexpr int kLanes = 32;

struct Instruction;
struct Warp;
using Handler = void (*)(Warp& warp, const Instruction& instruction);

enum class Kind : uint8_t {
  kPlain,       // done when the handler returns
  kAtomic,      // others may be waiting for this: a good time to let them run
  kCollective,  // runs when all lanes of the mask have come here
  kBarrier,     // of the block
  kBranch,
  kExit
};

// The operand `at` is where its 32 lanes begin: an offset among the warp's registers, or from the end of the
// kernel's constants if negative. A predicate is one word, a bit per lane.
struct Instruction {
  Handler execute = nullptr;
  Handler inner = nullptr;        // of a conversion from a part of a register
  const int32_t* list = nullptr;  // operands of a matrix instruction, or of what moves several registers
  int32_t d = 0, a = 0, b = 0, c = 0, e = 0;
  int32_t guard = kUnguarded;
  int32_t members = 0;  // the lanes that a collective is for
  uint32_t target = 0;  // of a branch: an instruction's index; of another: a table, a barrier's number, ...
  int64_t offset = 0;   // that is added to an address
  uint16_t site = 0;    // Module::sites
  uint8_t bytes = 0;    // of an element in memory
  uint8_t count = 0;    // of elements
  uint8_t width = 0;    // bytes of a lane of the register that is loaded or stored
  uint8_t address = 8;  // bytes of a lane of the register with the address
  bool is_signed = false;
  bool negated = false;  // the guard
  Kind kind = Kind::kPlain;

  static constexpr int32_t kUnguarded = INT32_MAX;
};

// A constant that depends on where a block's shared memory begins.
struct SharedAddress {
  int32_t at;
  int bytes;
  int64_t offset;
};

struct Entry {
  std::string name, readable;
  std::string_view header, body;
  int max_threads = 1024;
  struct Parameter {
    int64_t offset, bytes;
  };
  std::vector<Parameter> parameters;
  int64_t static_shared = 0;

  // What is found when the body is read.
  bool is_read = false;
  std::vector<Instruction> code;
  std::vector<std::string_view> texts;  // of each instruction
  std::vector<uint64_t> times;          // that each was executed
  std::vector<int32_t> lists;
  std::vector<std::byte> constants;
  std::vector<SharedAddress> shared_addresses;
  int64_t register_bytes = 0;  // of a warp
};

}  // namespace ptx
