// machine.h's functions on a loaded module; run() is the scheduler's.
#include "machine.h"

#include "../text/module.h"

namespace ptx {

ModulePointer load(std::string_view text) { return ModulePointer(new Module(text)); }
void DeleteModule::operator()(Module* module) const { delete module; }

void read_all(Module& module) {
  for (const auto& entry : module.entries) module.read(*entry);
}

std::vector<std::string> entries(const Module& module) {
  std::vector<std::string> names;
  for (const auto& entry : module.entries) names.push_back(entry->name);
  return names;
}

Attributes attributes(Module& module, const std::string& entry) {
  Entry& found = module.entry(entry);
  module.read(found);
  return {found.max_threads, found.static_shared, module.target};
}

std::vector<Executed> executed(const Module& module) {
  std::vector<Executed> all;
  for (const auto& entry : module.entries) {
    for (size_t i = 0; i < entry->code.size(); ++i) {
      const std::string& line = module.lines.sites[entry->code[i].site];
      all.push_back({entry->readable, line, std::string(entry->texts[i]), entry->times[i]});
    }
  }
  return all;
}

}  // namespace ptx
