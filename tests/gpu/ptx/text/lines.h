// Maps instructions to source lines. For inlined code, it is the innermost line outside of the wrappers in
// device.cuh and CUDA's headers.
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

  // Reads the .file directives of a module.
  void read_files(std::string_view module);
  // Reads the rest of a .loc directive and returns the site of the following instructions.
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
  std::map<Position, Position> callers_;  // latest call site of an inlined line
  std::map<std::pair<int64_t, int64_t>, uint16_t> known_;
  uint16_t last_ = 0;
};

}  // namespace ptx
