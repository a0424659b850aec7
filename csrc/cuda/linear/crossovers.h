// Up to how many rows of activations an NF4 GEMM is fused, and for which by wgmma. With more, it is faster to
// dequantise the weight and let cuBLAS, or torch's grouped GEMM, multiply. The numbers are data:
// peft_kernels/core/backends/crossovers.json, or of a file that PEFT_KERNELS_CROSSOVERS names. And which
// kernels are never used on a card.
#pragma once

#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "../core/kernels.h"

namespace peft_kernels::cuda {

// GEMMs with one weight, and grouped ones, for which rows and weights are those of an expert on average.
enum class Gemms { kLinear, kExperts };

struct Crossover {
  static constexpr int64_t kAny = std::numeric_limits<int64_t>::max();
  // Of rows; none by default.
  struct Range {
    int64_t least = 1, most = 0;

    bool has(int64_t rows) const { return least <= rows && rows <= most; }
  };

  int64_t weights = kAny;  // for weights of at most so many elements
  int64_t forward = kAny, backward = kAny;
  // Rows for which kernels with wgmma are taken, where they fit; goes before the limits above.
  Range forward_wgmma{}, backward_wgmma{};
};

// Of the cards of a compute capability that have `sms` multiprocessors or, with 0, of all those that have
// none of their own. In ascending order of weights, the last for any weight. Empty: as if never set.
void set_crossovers(Gemms gemms, int compute_capability, int sms, std::vector<Crossover> crossovers);

// Those of the card, otherwise of the highest compute capability up to its own; without any, kAny.
Crossover crossover_for(Gemms gemms, const Card& card, int64_t weights);

// The kernels that are never planned for cards like this one, by their names in plans: those that failed
// their self-test (peft_kernels/core/backends/self_test).
void set_kernels_off(int compute_capability, int sms, std::vector<std::string> names);
bool is_off(const Card& card, const char* kernel);

}  // namespace peft_kernels::cuda
