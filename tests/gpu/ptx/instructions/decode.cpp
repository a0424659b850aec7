#include "decode.h"

#include <algorithm>
#include <cstring>

#include "../machine/warp.h"

namespace ptx {
namespace {

const Table& table() {
  static const Table table = [] {
    Table all;
    add_integers(all);
    add_comparisons(all);
    add_floats(all);
    add_pairs(all);
    add_conversions(all);
    return all;
  }();
  return table;
}

// Bytes of all lanes of an operand, a multiple of the CPU's vector size.
constexpr int slot_bytes(int bytes) { return std::max(bytes, 2) * kLanes; }

// cvt may convert the low part of a wider register.
template <class Whole, class Part>
void take_part(Warp& warp, const Instruction& i) {
  const auto* whole = warp.in<Whole>(i.a);
  auto* const part = warp.out<Part>(i.e);
  for (int lane = 0; lane < kLanes; ++lane) part[lane] = static_cast<Part>(whole[lane]);
  Instruction of_part = i;
  of_part.a = i.e;
  i.inner(warp, of_part);
}

template <class Visit>
void for_registers(const Operand& operand, const Visit& visit) {
  if (operand.reg >= 0) visit(operand.reg);
  for (const Operand& each : operand.list) for_registers(each, visit);
}
template <class Visit>
void for_registers(const Statement& statement, const Visit& visit) {
  if (statement.guard >= 0) visit(statement.guard);
  for (const Operand& operand : statement.operands) for_registers(operand, visit);
}

bool uses_wgmma(const Body& body) {
  return std::any_of(body.statements.begin(), body.statements.end(),
                     [](const Statement& each) { return each.opcode.substr(0, 5) == "wgmma"; });
}

bool ends_block(std::string_view opcode) {
  return opcode == "bra" || opcode == "bra.uni" || opcode == "ret" || opcode == "exit";
}

}  // namespace

bool Decoder::Words::has(std::string_view part) const {
  return std::find(parts.begin(), parts.end(), part) != parts.end();
}

Decoder::Decoder(Module& module, Entry& entry, const Body& body)
    : module_(module), entry_(entry), body_(body) {
  for (const Variable& variable : body.shared) shared_[variable.name] = variable.offset;
  entry_.static_shared = body.shared_bytes;
  read_parameters();
  place_registers();
}

void Decoder::read_parameters() {
  Scanner scanner(entry_.header);
  int64_t end = 0;
  if (!scanner.take('(')) return;
  while (!scanner.take(')')) {
    if (scanner.word() != ".param") fail_to_read(entry_.header, "expected a parameter");
    const Declaration declaration = read_declaration(scanner);
    end = (end + declaration.align - 1) / declaration.align * declaration.align;
    parameters_[declaration.name] = end;
    entry_.parameters.push_back({end, declaration.bytes});
    end += declaration.bytes;
    scanner.take(',');
  }
}

// Assigns memory to registers. Registers used within one basic block, which are nearly all, share memory with
// others of their kind that are live before and after; diverged lanes have their own part of it. Other
// registers have their own memory: blocks run in another order than written.
void Decoder::place_registers() {
  struct Life {
    size_t first = SIZE_MAX, last = 0, block = 0;
    bool is_local = true;
  };
  std::vector<Life> lives(body_.registers.size());
  // A register in flight must not share its place.
  const bool own_places = uses_wgmma(body_);
  std::vector<size_t> blocks(body_.statements.size());
  std::vector<bool> block_starts(body_.statements.size() + 1);
  for (const Label& label : body_.labels) block_starts[label.statement] = true;
  size_t block = 0;
  for (size_t i = 0; i < body_.statements.size(); ++i) {
    if (block_starts[i] || (i > 0 && ends_block(body_.statements[i - 1].opcode))) ++block;
    for_registers(body_.statements[i], [&](int32_t reg) {
      Life& life = lives[static_cast<size_t>(reg)];
      if (life.first == SIZE_MAX) {
        life.first = i;
        life.block = block;
      }
      life.is_local = life.is_local && life.block == block && !own_places;
      life.last = i;
    });
  }

  std::map<std::pair<int, bool>, std::vector<int32_t>> free;  // by bytes per lane, and whether for locals
  offsets_.assign(lives.size(), -1);
  const auto place = [&](int bytes, bool is_local) {
    std::vector<int32_t>& list = free[{bytes, is_local}];
    if (list.empty()) {
      constexpr int kLine = 64;
      const int each = bytes == 0 ? 4 : slot_bytes(bytes), size = std::max(each, kLine);
      for (int i = size - each; i >= 0; i -= each) list.push_back(static_cast<int32_t>(register_bytes_) + i);
      register_bytes_ += static_cast<uint32_t>(size);
    }
    const int32_t offset = list.back();
    list.pop_back();
    return offset;
  };
  for (size_t i = 0; i < body_.statements.size(); ++i) {
    for_registers(body_.statements[i], [&](int32_t reg) {
      const auto index = static_cast<size_t>(reg);
      if (offsets_[index] < 0) {
        offsets_[index] = place(body_.registers[index].bytes, lives[index].is_local);
      }
    });
    for_registers(body_.statements[i], [&](int32_t reg) {
      const auto index = static_cast<size_t>(reg);
      Life& life = lives[index];
      if (life.is_local && life.last == i) {
        free[{body_.registers[index].bytes, true}].push_back(offsets_[index]);
        life.is_local = false;  // not twice for two operands of a statement
      }
    });
  }
}

// Of the current statement, for RegistersInFlight. wgmma does its own.
void Decoder::note_registers() {
  const std::string_view opcode = statement_->opcode;
  Entry::Touched& touched = entry_.touched.emplace_back();
  if (opcode.substr(0, 5) == "wgmma") return;
  if (statement_->guard >= 0) touched.read.push_back(statement_->guard);
  for (size_t k = 0; k < statement_->operands.size(); ++k) {
    const Operand& operand = statement_->operands[k];
    const bool is_result = k == 0 && operand.kind != Operand::Kind::kAddress && opcode.substr(0, 3) != "bar";
    for_registers(operand, [&](int32_t reg) { (is_result ? touched.written : touched.read).push_back(reg); });
  }
  touched.is_move = opcode.substr(0, 4) == "mov." && touched.written.size() == 1 && touched.read.size() == 1;
}

void Decoder::fail(const std::string& what) const {
  throw Fault(entry_.readable + ", " + module_.lines.sites[statement_->site] + ": " + what + ": " +
              std::string(statement_->text));
}

const Operand& Decoder::operand(size_t i) const {
  if (i >= statement_->operands.size()) fail("too few operands");
  return statement_->operands[i];
}

int32_t Decoder::source(const Operand& operand, int bytes) {
  switch (operand.kind) {
    case Operand::Kind::kRegister:
      if (operand.negated) fail("unexpected negated operand");
      if (width(operand.reg) != bytes) fail("register of an unexpected type");
      return at(operand.reg);
    case Operand::Kind::kImmediate:
      return constant(operand.value, bytes);
    default:
      fail("unexpected kind of operand");
  }
}

int32_t Decoder::destination(const Operand& operand, int bytes) {
  if (operand.kind == Operand::Kind::kSink) return unused(bytes);
  if (operand.kind != Operand::Kind::kRegister) fail("expected a register as result");
  if (width(operand.reg) != bytes) fail("register of an unexpected type");
  return at(operand.reg);
}

int32_t Decoder::unused(int bytes) {
  const auto [found, is_new] = unused_.try_emplace(bytes, static_cast<int32_t>(register_bytes_));
  if (is_new) register_bytes_ += static_cast<uint32_t>(slot_bytes(bytes));
  return found->second;
}

int32_t Decoder::constant(int64_t value, int bytes) {
  if (bytes < 8 && bytes > 0) value &= (int64_t{1} << 8 * bytes) - 1;
  if (bytes == 0) value = value != 0 ? 0xffffffff : 0;
  const auto [found, is_new] = constants_.try_emplace({value, bytes}, 0);
  if (is_new) {
    constant_bytes_ += slot_bytes(bytes);
    found->second = -constant_bytes_;
  }
  return found->second;
}

int32_t Decoder::shared_address(int64_t offset, int bytes) {
  constant_bytes_ += slot_bytes(bytes);
  entry_.shared_addresses.push_back({-constant_bytes_, bytes, offset});
  return -constant_bytes_;
}

void Decoder::fill_constants() {
  entry_.constants.resize(static_cast<size_t>(constant_bytes_));
  for (const auto& [constant, offset] : constants_) {
    const auto& [value, bytes] = constant;
    const int each = bytes == 0 ? 4 : bytes;
    std::byte* at = entry_.constants.data() + constant_bytes_ + offset;
    for (int lane = 0; lane < (bytes == 0 ? 1 : kLanes); ++lane) {
      std::memcpy(at + lane * each, &value, static_cast<size_t>(each));
    }
  }
}

std::optional<int64_t> Decoder::shared_offset(std::string_view name) const {
  const auto found = shared_.find(name);
  if (found != shared_.end()) return found->second;
  const Module::Global* variable = module_.find(name);
  if (variable == nullptr) return std::nullopt;
  if (variable->space == Module::Global::Space::kShared) return variable->offset;
  if (variable->space == Module::Global::Space::kDynamicShared) {
    constexpr int64_t kAlign = 16;
    return (entry_.static_shared + kAlign - 1) / kAlign * kAlign;
  }
  return std::nullopt;
}

int32_t Decoder::address_of(std::string_view name, int bytes, int64_t added) {
  const auto parameter = parameters_.find(name);
  if (parameter != parameters_.end()) return constant(parameter->second + added, bytes);
  if (const auto offset = shared_offset(name)) return shared_address(*offset + added, bytes);
  const Module::Global* variable = module_.find(name);
  if (variable == nullptr) fail("unknown name");
  const bool is_constant = variable->space == Module::Global::Space::kConstant;
  const auto* start = (is_constant ? module_.constants : module_.globals).data();
  return constant(reinterpret_cast<int64_t>(start) + variable->offset + added, bytes);
}

uint32_t Decoder::label(std::string_view name) const {
  for (int32_t scope = statement_->scope; scope >= 0; scope = body_.scopes[static_cast<size_t>(scope)]) {
    const auto found = labels_.find({name, scope});
    if (found != labels_.end()) return found->second;
  }
  fail("unknown label");
}

void Decoder::set_list(const std::vector<int32_t>& list) {
  lists_.emplace_back(entry_.code.size(), entry_.lists.size());
  entry_.lists.insert(entry_.lists.end(), list.begin(), list.end());
}

Instruction Decoder::begin() const {
  Instruction instruction;
  instruction.site = statement_->site;
  instruction.negated = statement_->negated;
  if (statement_->guard >= 0) instruction.guard = at(statement_->guard);
  return instruction;
}

void Decoder::emit(const Instruction& instruction) {
  entry_.code.push_back(instruction);
  entry_.texts.push_back(statement_->text);
}

void Decoder::emit_async(const Instruction& instruction) {
  entry_.is_async = true;
  emit(instruction);
}

bool Decoder::decode_from_part(const Opcode& opcode) {
  if (statement_->opcode.substr(0, 4) != "cvt." || opcode.operands.size() != 2) return false;
  const Operand& from = operand(1);
  const int bytes = opcode.operands[1] - '0';
  if (from.kind != Operand::Kind::kRegister || width(from.reg) <= bytes) return false;
  Instruction instruction = begin();
  instruction.d = destination(operand(0), opcode.operands[0] - '0');
  instruction.a = at(from.reg);
  instruction.e = unused(bytes);
  instruction.inner = opcode.execute;
  instruction.execute = bytes == 4             ? take_part<uint64_t, uint32_t>
                        : width(from.reg) == 8 ? take_part<uint64_t, uint16_t>
                                               : take_part<uint32_t, uint16_t>;
  emit(instruction);
  return true;
}

bool Decoder::decode_from_table() {
  const Opcode* opcode = table().find(statement_->opcode);
  if (opcode == nullptr) return false;
  Instruction instruction = begin();
  instruction.execute = opcode->execute;
  int32_t* const places[] = {&instruction.d, &instruction.a, &instruction.b, &instruction.c, &instruction.e};
  if (decode_from_part(*opcode)) return true;
  const size_t count = opcode->operands.size();
  if (statement_->operands.size() != count) fail("unexpected number of operands");
  for (size_t i = 0; i < count; ++i) {
    const char kind = opcode->operands[i];
    if (kind == 'q') {
      if (operand(i).kind != Operand::Kind::kPair) fail("expected two predicates, p|q");
      instruction.d = destination(operand(i).list[0], 0);
      instruction.e = destination(operand(i).list[1], 0);
      continue;
    }
    const int bytes = kind == 'p' ? 0 : kind - '0';
    *places[i] = i == 0 ? destination(operand(i), bytes) : source(operand(i), bytes);
  }
  emit(instruction);
  return true;
}

void Decoder::decode_one() {
  if (decode_from_table()) return;
  Words words;
  std::string_view rest = statement_->opcode;
  while (!rest.empty()) {
    const size_t end = std::min(rest.find('.'), rest.size());
    words.parts.push_back(rest.substr(0, end));
    rest.remove_prefix(std::min(end + 1, rest.size()));
  }
  for (const auto family :
       {decode_move, decode_memory, decode_ordering, decode_copy, decode_exchange, decode_matrix,
        decode_control, decode_mbarrier, decode_bulk_copy, decode_warpgroup, decode_wgmma}) {
    if (family(*this, words)) return;
  }
  fail("unsupported instruction");
}

void Decoder::decode() {
  // Every statement becomes exactly one instruction.
  for (const Label& label : body_.labels) labels_[{label.name, label.scope}] = label.statement;
  const bool tracks_registers = uses_wgmma(body_);
  entry_.register_count = body_.registers.size();
  for (const Statement& statement : body_.statements) {
    statement_ = &statement;
    decode_one();
    if (tracks_registers) note_registers();
    if (entry_.code.size() != static_cast<size_t>(&statement - body_.statements.data()) + 1) {
      fail("expected one instruction per statement");
    }
  }
  fill_constants();
  for (const auto& [index, first] : lists_) entry_.code[index].list = &entry_.lists[first];
  entry_.register_bytes = register_bytes_;
  entry_.times.assign(entry_.code.size(), 0);
}

void decode(Module& module, Entry& entry) {
  const Body body = read_body(entry.body, module.lines, module.shared_bytes);
  Entry fresh;
  fresh.name = entry.name;
  fresh.readable = entry.readable;
  fresh.header = entry.header;
  fresh.body = entry.body;
  fresh.max_threads = entry.max_threads;
  fresh.min_blocks = entry.min_blocks;
  Decoder(module, fresh, body).decode();
  entry = std::move(fresh);
}

}  // namespace ptx
