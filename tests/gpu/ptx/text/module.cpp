#include "module.h"

#include <cxxabi.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>

#include "statement.h"

namespace ptx {

std::string readable(const std::string& name) {
  int status = 0;
  char* text = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, &status);
  std::string result = status == 0 ? text : name;
  std::free(text);
  for (const std::string noise : {"peft_kernels::cuda::", "(anonymous namespace)::"}) {
    for (size_t at; (at = result.find(noise)) != std::string::npos;) result.erase(at, noise.size());
  }
  if (result.rfind("void ", 0) == 0) result.erase(0, 5);
  int depth = 0;
  size_t end = result.size();
  for (size_t i = 0; i < result.size() && end == result.size(); ++i) {
    if (result[i] == '<') ++depth;
    if (result[i] == '>') --depth;
    if (result[i] == '(' && depth == 0) end = i;
  }
  result.resize(end);
  const std::string launcher = "detail::entry<";
  if (result.rfind(launcher, 0) == 0) result = result.substr(launcher.size(), end - launcher.size() - 1);
  while (!result.empty() && result.back() == ' ') result.pop_back();
  return result;
}

namespace {

int64_t aligned(int64_t offset, int64_t align) { return (offset + align - 1) / align * align; }

}  // namespace

Module::Module(std::string_view text) : text_(text) {
  Scanner scanner(text_);
  lines.read_files(text_);
  while (!scanner.done()) {
    const std::string_view word = scanner.word();
    if (word == ".version" || word == ".address_size") {
      scanner.word();
    } else if (word == ".target") {
      const std::string name(scanner.word());
      target = std::atoi(name.c_str() + std::min(name.size(), name.find('_') + 1));
      is_for_one_architecture = !name.empty() && name.back() == 'a';
      while (scanner.take(',')) scanner.word();
    } else if (word == ".file") {
      scanner.line();
    } else if (word == ".section") {
      scanner.word();
      scanner.braces();
    } else if (word == ".extern" || word == ".visible" || word == ".weak" || word == ".common") {
      continue;
    } else if (word == ".shared") {
      read_variable(scanner, Global::Space::kShared);
    } else if (word == ".const") {
      read_variable(scanner, Global::Space::kConstant);
    } else if (word == ".global") {
      read_variable(scanner, Global::Space::kGlobal);
    } else if (word == ".entry") {
      read_entry(scanner);
    } else {
      fail_to_read(word.empty() ? scanner.rest() : word, "unsupported directive");
    }
  }
}

void Module::read_variable(Scanner& scanner, Global::Space space) {
  const Declaration declaration = read_declaration(scanner);
  const bool is_shared = space == Global::Space::kShared;
  Global variable{space, 0};
  if (is_shared && declaration.bytes == 0) {
    variable.space = Global::Space::kDynamicShared;
  } else if (is_shared) {
    variable.offset = aligned(shared_bytes, declaration.align);
    shared_bytes = variable.offset + declaration.bytes;
  } else {
    auto& bytes = space == Global::Space::kConstant ? constants : globals;
    variable.offset = aligned(static_cast<int64_t>(bytes.size()), declaration.align);
    bytes.resize(static_cast<size_t>(variable.offset + declaration.bytes));
    if (scanner.take('=')) {
      const bool is_list = scanner.take('{');
      size_t at = static_cast<size_t>(variable.offset);
      do {
        const int64_t value = scanner.number();
        if (at + static_cast<size_t>(declaration.element_bytes) > bytes.size()) {
          fail_to_read(declaration.name, "too many values");
        }
        std::memcpy(&bytes[at], &value, static_cast<size_t>(declaration.element_bytes));
        at += static_cast<size_t>(declaration.element_bytes);
      } while (is_list && scanner.take(','));
      if (is_list) scanner.expect('}');
    }
  }
  variables_[declaration.name] = variable;
  scanner.expect(';');
}

void Module::read_entry(Scanner& scanner) {
  auto entry = std::make_unique<Entry>();
  entry->name = std::string(scanner.word());
  entry->readable = readable(entry->name);
  const size_t begin = scanner.position();
  while (!scanner.is('{')) {
    if (scanner.done()) fail_to_read(entry->name, "a kernel without a body");
    scanner.rest();
    const std::string_view word = scanner.word();
    if (word.empty()) {
      // Punctuation.
      scanner.take(scanner.rest().front());
    } else if (word == ".maxntid") {
      entry->max_threads = static_cast<int>(scanner.number());
    } else if (word == ".minnctapersm") {
      entry->min_blocks = static_cast<int>(scanner.number());
    }
  }
  entry->header = scanner.from(begin);
  entry->body = scanner.braces();
  entries.push_back(std::move(entry));
}

Entry& Module::entry(const std::string& name) {
  for (const auto& each : entries) {
    if (each->name == name) return *each;
  }
  throw Fault("the PTX has no kernel " + name);
}

void Module::read(Entry& entry) {
  if (entry.is_read) return;
  decode(*this, entry);
  entry.is_read = true;
}

const Module::Global* Module::find(std::string_view name) const {
  const auto found = variables_.find(name);
  return found != variables_.end() ? &found->second : nullptr;
}

}  // namespace ptx
