// Runs the cases of the device primitives on a card, against arithmetic of the host, with nothing but the
// CUDA runtime. Prints a line per case; exits with 1 if one failed, 3 without a card. `primitives NAME...`
// runs only these cases.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdio>
#include <exception>
#include <string>
#include <vector>

#include "card_cases.h"
#include "cases/cases.cuh"

int main(int count, char** arguments) {
  int cards = 0;
  cudaDeviceProp card{};
  cudaError_t error = cudaGetDeviceCount(&cards);
  if (error == cudaSuccess) error = cudaGetDeviceProperties(&card, 0);
  if (error != cudaSuccess) {
    std::fprintf(stderr, "no card: %s\n", cudaGetErrorString(error));
    return 3;
  }
  std::printf("%s, compute capability %d.%d\n", card.name, card.major, card.minor);
  const std::vector<std::string> only(arguments + 1, arguments + count);
  std::vector<std::string> wrong;
  size_t right = 0;
  for (const auto* group :
       {&cases::value_cases(), &cases::matrix_cases(), &cases::memory_cases(), &cases::card_cases()}) {
    for (const auto& [name, run] : *group) {
      if (!only.empty() && std::find(only.begin(), only.end(), name) == only.end()) continue;
      const bool is_query = name.rfind("sum_is_truncated", 0) == 0;
      std::string outcome = is_query ? "yes" : "right";
      try {
        run();
        right += is_query ? 0 : 1;
      } catch (const std::exception& fault) {
        outcome = is_query ? "no" : std::string("WRONG, ") + fault.what();
        if (!is_query) wrong.push_back(name);
      }
      std::printf("%s: %s\n", name.c_str(), outcome.c_str());
      std::fflush(stdout);
      // Clears errors of the case; an illegal access is sticky and ends the run.
      cudaGetLastError();
      if (const cudaError_t lost = cudaDeviceSynchronize(); lost != cudaSuccess) {
        std::printf("%s: the card is lost: %s\n", name.c_str(), cudaGetErrorString(lost));
        return 1;
      }
    }
  }
  std::printf("%zu cases right, %zu wrong%s", right, wrong.size(), wrong.empty() ? "" : ":");
  for (const auto& name : wrong) std::printf(" %s", name.c_str());
  std::printf("\n");
  return wrong.empty() && right > 0 ? 0 : 1;
}
