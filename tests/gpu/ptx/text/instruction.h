// A kernel in executable form: one Instruction per PTX statement, with all names resolved.
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
  kAtomic,      // others may be waiting for it: a good time to switch
  kCollective,  // runs when all lanes of the mask have arrived
  kBarrier,     // of the block
  kMeeting,     // runs when all warps of a Meeting have arrived, which sleep until then
  kBranch,
  kExit
};

// Operands are offsets of their 32 lanes: among the warp's registers, or, if negative, from the end of the
// kernel's constants. A predicate is one word, a bit per lane.
struct Instruction {
  Handler execute = nullptr;
  Handler inner = nullptr;  // for a conversion from part of a register: the handler applied to that part
  const int32_t* list = nullptr;  // operands of matrix instructions and of moves of several registers
  int32_t d = 0, a = 0, b = 0, c = 0, e = 0;
  int32_t guard = kUnguarded;
  int32_t members = 0;  // member lanes of a collective
  uint32_t target = 0;  // branch: index of an instruction; otherwise a table, a number of copies, ...
  int64_t offset = 0;   // added to an address
  uint16_t site = 0;    // Module::sites
  uint8_t bytes = 0;    // of an element in memory
  uint8_t count = 0;    // of elements
  uint8_t width = 0;    // bytes per lane of the register loaded or stored
  uint8_t address = 8;  // bytes per lane of the address register
  bool is_signed = false;
  bool negated = false;  // the guard
  Kind kind = Kind::kPlain;

  static constexpr int32_t kUnguarded = INT32_MAX;
};

// A constant that depends on the start of a block's shared memory.
struct SharedAddress {
  int32_t at;
  int bytes;
  int64_t offset;
};

struct Entry {
  std::string name, readable;
  std::string_view header, body;
  int max_threads = 1024;
  int min_blocks = 1;  // of a multiprocessor
  struct Parameter {
    int64_t offset, bytes;
  };
  std::vector<Parameter> parameters;
  int64_t static_shared = 0;

  // Filled in when the body is read.
  bool is_read = false;
  std::vector<Instruction> code;
  std::vector<std::string_view> texts;  // of each instruction
  std::vector<uint64_t> times;          // execution count of each
  std::vector<int32_t> lists;
  std::vector<std::byte> constants;
  std::vector<SharedAddress> shared_addresses;
  int64_t register_bytes = 0;  // of a warp

  // Whether the block's warps are ordered by more than barriers of the whole block (AsyncBlock).
  bool is_async = false;
  // Registers by number, of kernels with wgmma: those that each instruction writes and reads.
  struct Touched {
    std::vector<int32_t> written, read;
    bool is_move = false;
  };
  std::vector<Touched> touched;
  size_t register_count = 0;
};

}  // namespace ptx
