// PTX text parsed into statements, with names not resolved yet.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace ptx {

struct Operand {
  enum class Kind : uint8_t { kRegister, kImmediate, kName, kAddress, kList, kPair, kSink };
  Kind kind = Kind::kSink;
  bool negated = false;       // !%p1
  int32_t reg = -1;           // a register, or that of an address
  int64_t value = 0;          // bits of an immediate; offset of a name or address
  std::string_view name;      // of a variable, label or special register
  std::vector<Operand> list;  // {a, b} or a|b; of an address, its coordinates
};

struct Statement {
  int32_t guard = -1;  // a register
  bool negated = false;
  uint16_t site = 0;
  int32_t scope = 0;  // Body::scopes
  std::string_view opcode, text;
  std::vector<Operand> operands;
};

struct Register {
  int bytes;  // of a lane; 0: a predicate
};

struct Label {
  std::string_view name;
  uint32_t statement;
  int32_t scope;
};

// A variable in shared memory.
struct Variable {
  std::string_view name;
  int64_t offset;
};

struct Body {
  std::vector<Statement> statements;
  std::vector<Register> registers;
  std::vector<Label> labels;
  std::vector<int32_t> scopes = {-1};  // the enclosing scope of each {}; the first is the body
  std::vector<Variable> shared;
  int64_t shared_bytes = 0;
};

struct Lines;

// `shared_bytes`: bytes of module-level shared variables. Throws Fault.
Body read_body(std::string_view text, Lines& lines, int64_t shared_bytes);

// ---- Scanning, for module.cpp and body.cpp ------------------------------------------------------------

[[noreturn]] void fail_to_read(std::string_view near, const std::string& what);

class Scanner {
 public:
  explicit Scanner(std::string_view text) : text_(text) {}
  bool done();  // after spaces and comments
  bool is(char c) { return !done() && text_[at_] == c; }
  bool take(char c);  // consumes it if it is next
  void expect(char c);
  std::string_view word();         // letters, digits, _ $ % . and what follows :: in opcodes
  std::string_view until(char c);  // and consumes that
  std::string_view line();         // the rest of the line
  std::string_view braces();       // the contents of the following {}
  int64_t number();
  size_t position() const { return at_; }
  std::string_view from(size_t position) const { return text_.substr(position, at_ - position); }
  std::string_view rest() const { return text_.substr(at_); }

 private:
  std::string_view text_;
  size_t at_ = 0;
};

struct Declaration {
  std::string_view name;
  int64_t align = 1, bytes = 0, element_bytes = 1;
};
Declaration read_declaration(Scanner& scanner);  // variable or parameter, from ".align" or its type on

// The bits of an immediate operand: 12, -3, 0x1f, 0f3F800000, 0d3FF0000000000000.
bool read_immediate(std::string_view word, int64_t& value);
int bytes_of_type(std::string_view type);  // "b32", without ".v2"; 0 for pred, -1 if not a type

}  // namespace ptx
