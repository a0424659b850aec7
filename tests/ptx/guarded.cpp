#include "guarded.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <mutex>
#include <unordered_map>

namespace peft_kernels::cudart {
namespace {

struct Mapping {
  void* start;
  size_t bytes;
};

struct Mappings {
  std::mutex mutex;
  std::unordered_map<void*, Mapping> by_pointer;
};
Mappings& mappings() {
  static Mappings& all = *new Mappings;  // tensors may be freed after static objects are gone
  return all;
}

}  // namespace

void* allocate_guarded(size_t bytes) {
  constexpr size_t kAlignment = 16;  // what kernels and torch count on
  const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  const size_t rounded = (std::max<size_t>(bytes, 1) + kAlignment - 1) / kAlignment * kAlignment;
  const size_t usable = (rounded + page - 1) / page * page;
  void* start = mmap(nullptr, usable + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (start == MAP_FAILED) return nullptr;
  if (mprotect(static_cast<char*>(start) + usable, page, PROT_NONE) != 0) {
    munmap(start, usable + page);
    return nullptr;
  }
  void* pointer = static_cast<char*>(start) + usable - rounded;
  Mappings& all = mappings();
  const std::lock_guard<std::mutex> lock(all.mutex);
  all.by_pointer[pointer] = {start, usable + page};
  return pointer;
}

void free_guarded(void* pointer) {
  if (pointer == nullptr) return;
  Mappings& all = mappings();
  const std::lock_guard<std::mutex> lock(all.mutex);
  const auto found = all.by_pointer.find(pointer);
  if (found == all.by_pointer.end()) return;
  munmap(found->second.start, found->second.bytes);
  all.by_pointer.erase(found);
}

}  // namespace peft_kernels::cudart
