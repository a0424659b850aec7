// Which line of the source an instruction comes from. A line that was inlined into another is named by the
// innermost one that is neither in the wrappers of device.cuh nor in CUDA's own headers.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <tuple>
#include <vector>

namespace ptx {

class Scanner;

struct Lines {
  std::vector<std::string> sites = {"?"};  // "file.cuh:12"

  // Reads the directives .file of a module.
  void read_files(std::string_view module);
  // Reads the rest of a directive .loc, and returns the site of what follows.
  uint16_t read(Scanner& scanner);

 private:
  struct Position {
    int64_t file = 0, line = 0, column = 0;
    bool operator<(const Position& other) const {
      return std::tie(file, line, column) < std::tie(other.file, other.line, other.column);
    }
  };
  struct File {
    std::string name;
    bool is_wrapper;
  };

  uint16_t site_of(const Position& position);

  std::map<int64_t, File> files_;
  std::map<Position, Position> callers_;  // where a line was inlined, as told last
  std::map<std::pair<int64_t, int64_t>, uint16_t> known_;
  uint16_t last_ = 0;
};

}  // namespace ptx
