// Decodes statements into instructions. Opcodes with only register and immediate operands are in tables;
// memory, control and moves are decoded in code.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include "../text/instruction.h"
#include "../text/module.h"
#include "../text/statement.h"

namespace ptx {

// A handler and its operands, result first: bytes per lane as a digit, 'p' for a predicate, 'q' for a pair of
// result predicates, p|q, in d and e.
struct Opcode {
  std::string operands;
  Handler execute;
};

class Table {
 public:
  void add(const std::string& opcode, const std::string& operands, Handler execute) {
    opcodes_[opcode] = {operands, execute};
  }
  const Opcode* find(std::string_view opcode) const {
    const auto found = opcodes_.find(std::string(opcode));
    return found != opcodes_.end() ? &found->second : nullptr;
  }

 private:
  std::unordered_map<std::string, Opcode> opcodes_;
};

void add_integers(Table& table);     // integers.cpp
void add_comparisons(Table& table);  // comparisons.cpp
void add_floats(Table& table);       // floats.cpp
void add_pairs(Table& table);        // pairs.cpp
void add_conversions(Table& table);  // conversions.cpp

// Decodes the body of one kernel.
class Decoder {
 public:
  Decoder(Module& module, Entry& entry, const Body& body);
  void decode();

  // ---- For the decode_* functions of instruction families, which return false for unknown opcodes -----
  struct Words {
    std::vector<std::string_view> parts;  // parts of the opcode between dots
    std::string_view operator[](size_t i) const { return i < parts.size() ? parts[i] : std::string_view(); }
    std::string_view last() const { return parts.back(); }
    bool has(std::string_view part) const;
  };

  [[noreturn]] void fail(const std::string& what) const;  // names the statement
  // Offset of a register or constant with the given bytes per lane, 0 for a predicate.
  int32_t source(const Operand& operand, int bytes);
  int32_t destination(const Operand& operand, int bytes);
  int32_t constant(int64_t value, int bytes);
  int32_t at(int32_t reg) const { return offsets_[static_cast<size_t>(reg)]; }
  int width(int32_t reg) const { return body_.registers[static_cast<size_t>(reg)].bytes; }
  int32_t unused(int bytes);  // a register for unused results
  // A constant with the address of a variable or parameter in its space.
  int32_t address_of(std::string_view name, int bytes, int64_t added);
  uint32_t label(std::string_view name) const;
  void set_list(const std::vector<int32_t>& list);  // of the next emitted instruction
  void emit(const Instruction& instruction);
  void emit_async(const Instruction& instruction);  // its kernel's threads get clocks
  Instruction begin() const;                        // with the guard and site of the current statement

  const Statement& statement() const { return *statement_; }
  const Operand& operand(size_t i) const;
  Entry& entry() { return entry_; }
  bool is_kind(const Operand& operand, Operand::Kind kind) const { return operand.kind == kind; }
  Module& module() { return module_; }

 private:
  void place_registers();
  void note_registers();
  void read_parameters();
  void decode_one();
  void fill_constants();
  std::optional<int64_t> shared_offset(std::string_view name) const;
  int32_t shared_address(int64_t offset, int bytes);
  bool decode_from_table();
  bool decode_from_part(const Opcode& opcode);

  Module& module_;
  Entry& entry_;
  const Body& body_;
  const Statement* statement_ = nullptr;
  std::vector<int32_t> offsets_;  // of registers
  std::map<int, int32_t> unused_;
  std::map<std::pair<int64_t, int>, int32_t> constants_;
  std::vector<std::pair<size_t, size_t>> lists_;  // index of an instruction, and start of its list
  std::unordered_map<std::string_view, int64_t> parameters_, shared_;
  std::map<std::pair<std::string_view, int32_t>, uint32_t> labels_;  // by name and scope
  uint32_t register_bytes_ = 0;
  int32_t constant_bytes_ = 0;
};

// loads.cpp: sets a memory instruction's a, offset and address; and computes the lanes' addresses from them.
void set_address(Decoder& decoder, Instruction& instruction, const Operand& operand);
void read_addresses(const Warp& warp, const Instruction& instruction, uint64_t (&addresses)[kLanes]);

bool decode_move(Decoder& decoder, const Decoder::Words& words);       // moves.cpp
bool decode_memory(Decoder& decoder, const Decoder::Words& words);     // loads.cpp
bool decode_ordering(Decoder& decoder, const Decoder::Words& words);   // ordering.cpp: atom, fence
bool decode_copy(Decoder& decoder, const Decoder::Words& words);       // copies.cpp
bool decode_exchange(Decoder& decoder, const Decoder::Words& words);   // exchanges.cpp
bool decode_matrix(Decoder& decoder, const Decoder::Words& words);     // matrices.cpp
bool decode_mbarrier(Decoder& decoder, const Decoder::Words& words);   // mbarriers.cpp
bool decode_bulk_copy(Decoder& decoder, const Decoder::Words& words);  // bulk_copies.cpp
bool decode_wgmma(Decoder& decoder, const Decoder::Words& words);      // wgmma.cpp
bool decode_warpgroup(Decoder& decoder, const Decoder::Words& words);  // warpgroups.cpp
bool decode_control(Decoder& decoder, const Decoder::Words& words);    // control.cpp

}  // namespace ptx
