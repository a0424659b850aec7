#include "guarded.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <deque>
#include <mutex>
#include <unordered_map>
#include <utility>

namespace peft_kernels::cudart {
namespace {

struct Mapping {
  void* start;
  size_t bytes;
  uint64_t serial;
};

size_t page_bytes() {
  static const auto bytes = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  return bytes;
}

struct Mappings {
  std::mutex mutex;
  std::unordered_map<void*, Mapping> by_pointer;
  std::deque<std::pair<void*, uint64_t>> guarded;  // with their serial numbers, oldest first
  uint64_t serial = 0;

  // Linux allows 65530 mappings. Regions that are no longer guarded merge with their neighbours.
  void retire_the_oldest() {
    constexpr size_t kMost = 8000;
    while (guarded.size() > kMost) {
      const auto [pointer, made] = guarded.front();
      guarded.pop_front();
      const auto found = by_pointer.find(pointer);
      if (found == by_pointer.end() || found->second.serial != made) continue;  // freed since
      const Mapping& old = found->second;
      mprotect(static_cast<char*>(old.start) + old.bytes - page_bytes(), page_bytes(),
               PROT_READ | PROT_WRITE);
    }
  }
};
Mappings& mappings() {
  static Mappings& all = *new Mappings;  // tensors may be freed after static objects are gone
  return all;
}

}  // namespace

void* allocate_guarded(size_t bytes) {
  constexpr size_t kAlignment = 16;  // expected by kernels and torch
  const size_t page = page_bytes();
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
  all.by_pointer[pointer] = {start, usable + page, ++all.serial};
  all.guarded.emplace_back(pointer, all.serial);
  all.retire_the_oldest();
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
