#include "lines.h"

#include "fault.h"
#include "statement.h"

namespace ptx {

void Lines::read_files(std::string_view module) {
  size_t at = 0;
  while ((at = module.find(".file", at)) != std::string_view::npos) {
    const bool begins = at == 0 || module.find_last_not_of(" \t", at - 1) == module.rfind('\n', at);
    at += 5;
    if (!begins) continue;
    Scanner scanner(module.substr(at));
    const int64_t index = scanner.number();
    scanner.expect('"');
    const std::string path(scanner.until('"'));
    const std::string name = path.substr(path.rfind('/') + 1);
    files_[index] = {name, name == "device.cuh" || path.find("/include/") != std::string::npos};
  }
}

uint16_t Lines::read(Scanner& scanner) {
  Scanner line(scanner.line());
  Position position, caller;
  position.file = line.number();
  position.line = line.number();
  position.column = line.number();
  bool is_inlined = false;
  while (line.take(',')) {
    const std::string_view word = line.word();
    if (word == "inlined_at") {
      caller.file = line.number();
      caller.line = line.number();
      caller.column = line.number();
      is_inlined = true;
    } else {
      line.word();
      if (line.take('+')) line.word();
    }
  }
  // Line 0: code without a line.
  if (position.line == 0) return last_;
  if (is_inlined) {
    callers_[position] = caller;
  } else {
    callers_.erase(position);
  }
  return last_ = site_of(position);
}

uint16_t Lines::site_of(const Position& innermost) {
  Position position = innermost;
  constexpr int kMostCalls = 64;
  for (int i = 0; i < kMostCalls && files_[position.file].is_wrapper; ++i) {
    const auto caller = callers_.find(position);
    if (caller == callers_.end()) {
      position = innermost;
      break;
    }
    position = caller->second;
  }
  const auto [found, is_new] = known_.try_emplace({position.file, position.line}, 0);
  if (is_new) {
    if (sites.size() > UINT16_MAX) throw Fault("PTX: too many source lines");
    found->second = static_cast<uint16_t>(sites.size());
    sites.push_back(files_[position.file].name + ":" + std::to_string(position.line));
  }
  return found->second;
}

}  // namespace ptx
