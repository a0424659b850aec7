// Which threads run tasks, and how they wait for each other. On a quiet machine OpenMP's threads do, which
// spin between regions: nothing starts sooner. Where other processes compete for the cores, a spinning thread
// takes time from the very thread it waits for. Regions then run in threads of our own: the caller takes
// tasks as long as there are any and waits only for those that others have begun, and no thread spins.
#pragma once

#include <c10/util/FunctionRef.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <optional>

#include "../../common/integers.h"

namespace peft_kernels::cpu {

// The number of threads torch uses for an op; several under a sanitizer.
int64_t get_num_threads();

// Sanitizers only see work that is divided, so for them small work is divided too.
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
inline constexpr bool kSanitized = true;
#else
inline constexpr bool kSanitized = false;
#endif

// Whether other processes compete for the cores.
bool is_busy();
// For tests and benchmarks: overrides what is measured; nullopt returns to measuring.
void set_busy(std::optional<bool> busy);

// On a busy machine each thread gets this many tasks, and holds one at a time.
inline constexpr int64_t kTasksPerThread = 8;
inline int64_t tasks_for(int64_t threads) { return is_busy() ? threads * kTasksPerThread : threads; }

// The tasks of a region, by index.
class Tasks {
 public:
  // The first `given` tasks are assigned to threads in advance.
  Tasks(int64_t count, int64_t assigned) : count_(count), next_(assigned) {}

  bool any_left() const { return next_.load(std::memory_order_relaxed) < count_; }
  // The next task that is not taken; count() or more when there is none.
  int64_t take() { return next_.fetch_add(1, std::memory_order_relaxed); }
  void drop() { next_.store(count_, std::memory_order_relaxed); }
  int64_t count() const { return count_; }

 private:
  const int64_t count_;
  std::atomic<int64_t> next_;
};

// The tasks of one thread: those assigned to it, then any that are left.
class Share {
 public:
  Share(Tasks& tasks, int64_t first, int64_t last) : tasks_(tasks), assigned_(first), last_(last) {}

  bool take(int64_t& task) {
    task = assigned_ < last_ ? assigned_++ : tasks_.take();
    return task < tasks_.count();
  }

 private:
  Tasks& tasks_;
  int64_t assigned_;
  const int64_t last_;
};

// Calls work(share) in up to `threads` threads, the caller's among them; each takes tasks from its share
// until none is left. Results must not depend on which thread runs a task, nor on how many run. Returns when
// every task is done. Rethrows the first exception of `work`; tasks not yet begun are then dropped. Inside
// another region, or while another caller uses our own threads, the caller runs all tasks. `work` must not
// call torch's parallel ops.
void run_tasks(int64_t tasks, int64_t threads, c10::function_ref<void(Share&)> work);

// Calls body(from, to) for parts of [begin, end), none smaller than `grain` but the last.
template <class Body>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Body& body) {
  const int64_t count = end - begin;
  if (count <= 0) return;
  const int64_t most = ceil_div(count, std::max<int64_t>(grain, 1));
  const int64_t threads = std::min(get_num_threads(), most);
  if (threads == 1) return body(begin, end);
  constexpr int64_t kLine = 64;  // elements: long parts begin at whole vectors
  int64_t part = ceil_div(count, std::min(tasks_for(threads), most));
  if (part > 16 * kLine) part = ceil_div(part, kLine) * kLine;
  run_tasks(ceil_div(count, part), threads, [&](Share& share) {
    for (int64_t task; share.take(task);) body(begin + task * part, std::min(begin + (task + 1) * part, end));
  });
}

}  // namespace peft_kernels::cpu
