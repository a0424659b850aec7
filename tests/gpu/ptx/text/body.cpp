// Parses the body of a kernel.
#include <algorithm>
#include <cctype>
#include <string>
#include <unordered_map>
#include <utility>

#include "fault.h"
#include "lines.h"
#include "statement.h"

namespace ptx {
namespace {

class BodyReader {
 public:
  BodyReader(std::string_view text, Lines& lines, int64_t shared_bytes) : scanner_(text), lines_(lines) {
    body_.shared_bytes = shared_bytes;
  }

  Body read() {
    scopes_.emplace_back();
    while (!scanner_.done()) {
      if (scanner_.take('{')) {
        body_.scopes.push_back(scopes_.back().number);
        scopes_.emplace_back();
        scopes_.back().number = static_cast<int32_t>(body_.scopes.size()) - 1;
      } else if (scanner_.take('}')) {
        if (scopes_.size() == 1) fail_to_read(scanner_.rest(), "a } too many");
        scopes_.pop_back();
      } else if (!scanner_.take(';')) {
        read_one();
      }
    }
    return std::move(body_);
  }

 private:
  struct Scope {
    int32_t number = 0;  // in Body::scopes
    std::unordered_map<std::string_view, int32_t> names;
    struct Range {
      int32_t first, count;
    };
    std::unordered_map<std::string_view, Range> ranges;  // e.g. %r of %r<12>
  };

  void read_one() {
    const size_t begin = scanner_.position();
    if (scanner_.is('@')) return read_statement(begin);
    const std::string_view word = scanner_.word();
    if (word.empty()) fail_to_read(scanner_.rest(), "expected a statement");
    if (word == ".loc") {
      site_ = lines_.read(scanner_);
    } else if (word == ".reg") {
      read_registers();
    } else if (word == ".shared") {
      read_variable();
    } else if (word == ".pragma") {
      scanner_.until(';');
    } else if (word[0] == '.') {
      fail_to_read(word, "unsupported directive");
    } else if (scanner_.take(':')) {
      body_.labels.push_back({word, static_cast<uint32_t>(body_.statements.size()), scopes_.back().number});
    } else {
      read_statement(begin, word);
    }
  }

  int32_t new_register(int bytes) {
    body_.registers.push_back({bytes});
    return static_cast<int32_t>(body_.registers.size()) - 1;
  }

  void read_registers() {
    const std::string_view type = scanner_.word();
    const int bytes = type.empty() ? -1 : bytes_of_type(type.substr(1));
    if (bytes < 0) fail_to_read(type, "registers of an unknown type");
    do {
      const std::string_view name = scanner_.word();
      if (scanner_.take('<')) {
        const auto count = static_cast<int32_t>(scanner_.number());
        scanner_.expect('>');
        const auto first = static_cast<int32_t>(body_.registers.size());
        for (int32_t i = 0; i < count; ++i) new_register(bytes);
        scopes_.back().ranges[name] = {first, count};
      } else {
        scopes_.back().names[name] = new_register(bytes);
      }
    } while (scanner_.take(','));
    scanner_.expect(';');
  }

  void read_variable() {
    const Declaration declaration = read_declaration(scanner_);
    int64_t& bytes = body_.shared_bytes;
    bytes = (bytes + declaration.align - 1) / declaration.align * declaration.align;
    body_.shared.push_back({declaration.name, bytes});
    bytes += declaration.bytes;
    scanner_.expect(';');
  }

  int32_t find_register(std::string_view name) const {
    const size_t digits = name.find_last_not_of("0123456789") + 1;
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      const auto found = scope->names.find(name);
      if (found != scope->names.end()) return found->second;
      const auto range = scope->ranges.find(name.substr(0, digits));
      if (range == scope->ranges.end() || digits == name.size()) continue;
      const int index = std::stoi(std::string(name.substr(digits)));
      if (index < range->second.count) return range->second.first + index;
    }
    return -1;
  }

  void read_statement(size_t begin, std::string_view opcode = {}) {
    Statement statement;
    statement.site = site_;
    statement.scope = scopes_.back().number;
    if (scanner_.take('@')) {
      statement.negated = scanner_.take('!');
      const std::string_view name = scanner_.word();
      statement.guard = find_register(name);
      if (statement.guard < 0) fail_to_read(name, "an unknown register");
    }
    statement.opcode = opcode.empty() ? scanner_.word() : opcode;
    if (!scanner_.is(';')) {
      do {
        statement.operands.push_back(read_operand());
      } while (scanner_.take(','));
    }
    statement.text = scanner_.from(begin);
    if (!scanner_.take(';')) fail_to_read(statement.text, "an instruction that the machine cannot read");
    body_.statements.push_back(std::move(statement));
  }

  Operand read_operand() {
    Operand operand = read_single();
    if (!scanner_.take('|')) return operand;
    Operand pair;
    pair.kind = Operand::Kind::kPair;
    pair.list.push_back(std::move(operand));
    pair.list.push_back(read_single());
    return pair;
  }

  Operand read_single() {
    Operand operand;
    if (scanner_.take('{')) {
      operand.kind = Operand::Kind::kList;
      do {
        operand.list.push_back(read_single());
      } while (scanner_.take(','));
      scanner_.expect('}');
      return operand;
    }
    if (scanner_.take('[')) {
      operand = read_single();
      if (operand.kind == Operand::Kind::kName || operand.kind == Operand::Kind::kRegister) {
        operand.kind = Operand::Kind::kAddress;
      } else if (operand.kind == Operand::Kind::kImmediate) {
        operand.kind = Operand::Kind::kAddress;
        operand.reg = -1;
      }
      if (scanner_.take(',')) operand.list = read_single().list;
      scanner_.expect(']');
      return operand;
    }
    operand.negated = scanner_.take('!');
    const size_t begin = scanner_.position();
    const bool is_negative = scanner_.take('-');
    const std::string_view word = scanner_.word();
    if (word == "_") return operand;
    if (read_immediate(is_negative ? "-" + std::string(word) : std::string(word), operand.value)) {
      operand.kind = Operand::Kind::kImmediate;
      return operand;
    }
    if (word.empty() || is_negative) fail_to_read(scanner_.from(begin), "expected an operand");
    operand.reg = find_register(word);
    operand.name = word;
    operand.kind = operand.reg >= 0 ? Operand::Kind::kRegister : Operand::Kind::kName;
    if (scanner_.take('+')) operand.value = scanner_.number();
    return operand;
  }

  Scanner scanner_;
  Lines& lines_;
  Body body_;
  std::vector<Scope> scopes_;
  uint16_t site_ = 0;
};

}  // namespace

Declaration read_declaration(Scanner& scanner) {
  Declaration declaration;
  std::string_view word = scanner.word();
  if (word == ".align") {
    declaration.align = scanner.number();
    word = scanner.word();
  }
  const int bytes = word.empty() ? -1 : bytes_of_type(word.substr(1));
  if (bytes <= 0) fail_to_read(word, "a variable of an unknown type");
  declaration.element_bytes = bytes;
  declaration.align = std::max<int64_t>(declaration.align, bytes);
  declaration.name = scanner.word();
  // `.ptr .global .align 16`: attributes of the pointee.
  while (!declaration.name.empty() && declaration.name.front() == '.') {
    if (declaration.name == ".align") scanner.number();
    declaration.name = scanner.word();
  }
  declaration.bytes = bytes;
  if (scanner.take('[')) {
    declaration.bytes = scanner.is(']') ? 0 : bytes * scanner.number();
    scanner.expect(']');
  }
  return declaration;
}

Body read_body(std::string_view text, Lines& lines, int64_t shared_bytes) {
  return BodyReader(text, lines, shared_bytes).read();
}

}  // namespace ptx
