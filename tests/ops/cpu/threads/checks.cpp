// Ops for tests of threads: run tasks that only count, wait and throw.
#include <ATen/ATen.h>
#include <torch/library.h>

#include <atomic>
#include <chrono>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <tuple>
#include <vector>

#include "../../../../csrc/cpu/core/namespace.h"
#include "../../../../csrc/cpu/core/threads.h"

namespace peft_kernels::cpu {
namespace {

// How often each task ran, in how many threads, and how many tasks of nested regions ran in the thread that
// began them. Task `fails_at` throws.
std::tuple<std::vector<int64_t>, int64_t, int64_t> count_tasks(int64_t tasks, int64_t threads,
                                                               double milliseconds, int64_t inner,
                                                               int64_t fails_at) {
  std::vector<std::atomic<int64_t>> counts(tasks);
  std::atomic<int64_t> inner_count{0};
  std::mutex mutex;
  std::set<std::thread::id> ids;
  run_tasks(tasks, threads, [&](Share& share) {
    for (int64_t task; share.take(task);) {
      TORCH_CHECK(task != fails_at, "task ", task, " fails");
      std::this_thread::sleep_for(std::chrono::duration<double, std::milli>(milliseconds));
      counts[task].fetch_add(1);
      const std::thread::id own = std::this_thread::get_id();
      run_tasks(inner, threads, [&](Share& mine) {
        for (int64_t unused; mine.take(unused);) inner_count.fetch_add(std::this_thread::get_id() == own);
      });
      const std::lock_guard<std::mutex> lock(mutex);
      ids.insert(own);
    }
  });
  return {std::vector<int64_t>(counts.begin(), counts.end()), static_cast<int64_t>(ids.size()),
          inner_count.load()};
}

// The begins and ends of the parts that parallel_for divides a range into, ascending.
std::vector<int64_t> parts(int64_t begin, int64_t end, int64_t grain) {
  std::mutex mutex;
  std::set<std::pair<int64_t, int64_t>> found;
  parallel_for(begin, end, grain, [&](int64_t from, int64_t to) {
    const std::lock_guard<std::mutex> lock(mutex);
    found.emplace(from, to);
  });
  std::vector<int64_t> flat;
  for (const auto& [from, to] : found) flat.insert(flat.end(), {from, to});
  return flat;
}

// The sanitizer that the library is built with.
std::string sanitizer() {
#if defined(__SANITIZE_THREAD__)
  return "thread";
#elif defined(__SANITIZE_ADDRESS__)
  return "address";
#else
  return "";
#endif
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(PEFT_KERNELS_JOIN(PEFT_KERNELS_NAMESPACE, _library), m) {
  m.def(
      "count_tasks(int tasks, int threads, float milliseconds, int inner, int fails_at) -> (int[], int, int)",
      count_tasks);
  m.def("parts(int begin, int end, int grain) -> int[]", parts);
  m.def("sanitizer() -> str", sanitizer);
}

}  // namespace peft_kernels::cpu
