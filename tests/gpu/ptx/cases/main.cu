// `cases NAME` runs one case on a card and prints its error, or "clean"; without a name, all cases that have
// no planted fault.
#include <cstdio>
#include <exception>
#include <string>

#include "cases.cuh"

int main(int count, char** arguments) {
  bool failed = false;
  for (const auto* group : {&cases::value_cases(), &cases::matrix_cases(), &cases::memory_cases(),
                            &cases::thread_faults(), &cases::memory_faults(), &cases::block_faults()}) {
    for (const auto& [name, run] : *group) {
      const bool is_broken = name.find("-broken") != std::string::npos;
      if (count > 1 ? name != arguments[1] : is_broken) continue;
      std::string outcome = "clean";
      try {
        run();
      } catch (const std::exception& error) {
        outcome = error.what();
        failed = true;
      }
      std::printf("%s: %s\n", name.c_str(), outcome.c_str());
    }
  }
  return failed;
}
