// The crossovers of cards, as set from Python.
#include "crossovers.h"

#include <algorithm>
#include <atomic>
#include <map>
#include <mutex>
#include <utility>

namespace peft_kernels::cuda {
namespace {

std::mutex mutex;
// By compute capability and multiprocessors.
using Table = std::map<std::pair<int, int>, std::vector<Crossover>>;
Table& table(Gemms gemms) {
  static Table linear, experts;
  return gemms == Gemms::kLinear ? linear : experts;
}

const std::vector<Crossover>* crossovers_of(const Table& table, const Card& card) {
  const auto own = table.find({card.compute_capability, card.sms});
  if (own != table.end()) return &own->second;
  const std::vector<Crossover>* found = nullptr;
  for (const auto& [key, crossovers] : table) {
    if (key.second == 0 && key.first <= card.compute_capability) found = &crossovers;
  }
  return found;
}

std::map<std::pair<int, int>, std::vector<std::string>>& kernels_off() {
  static std::map<std::pair<int, int>, std::vector<std::string>> names;
  return names;
}
std::atomic<bool> any_is_off{false};

}  // namespace

void set_crossovers(Gemms gemms, int compute_capability, int sms, std::vector<Crossover> crossovers) {
  const std::lock_guard lock(mutex);
  const std::pair key{compute_capability, sms};
  if (crossovers.empty()) {
    table(gemms).erase(key);
  } else {
    table(gemms)[key] = std::move(crossovers);
  }
}

Crossover crossover_for(Gemms gemms, const Card& card, int64_t weights) {
  const std::lock_guard lock(mutex);
  const std::vector<Crossover>* crossovers = crossovers_of(table(gemms), card);
  if (crossovers == nullptr) return {};
  for (const Crossover& crossover : *crossovers) {
    if (weights <= crossover.weights) return crossover;
  }
  return crossovers->back();
}

void set_kernels_off(int compute_capability, int sms, std::vector<std::string> names) {
  const std::lock_guard lock(mutex);
  any_is_off = any_is_off || !names.empty();
  kernels_off()[{compute_capability, sms}] = std::move(names);
}

bool is_off(const Card& card, const char* kernel) {
  if (!any_is_off) return false;
  const std::lock_guard lock(mutex);
  const auto found = kernels_off().find({card.compute_capability, card.sms});
  if (found == kernels_off().end()) return false;
  return std::find(found->second.begin(), found->second.end(), kernel) != found->second.end();
}

}  // namespace peft_kernels::cuda
