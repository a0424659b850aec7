// Which threads compute, and how they wait for each other. On a quiet machine OpenMP's do, which spin between
// regions: nothing starts sooner. Where other processes want the same cores a thread that spins takes them
// from the very thread it waits for, so regions then go to threads of our own: the caller takes tasks as long
// as there are any, waits only for those that others have begun, and nobody spins (threads.cpp).
#pragma once

#include <c10/util/FunctionRef.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <optional>

#include "../../common/integers.h"

namespace peft_kernels::cpu {

// Torch's number of threads for an op; several under a sanitizer.
int64_t get_num_threads();

// Sanitizers see only what is shared out: for them small work is, too.
#if defined(__SANITIZE_THREAD__) || defined(__SANITIZE_ADDRESS__)
inline constexpr bool kSanitized = true;
#else
inline constexpr bool kSanitized = false;
#endif

// Whether other processes use the cores that threads of ours want.
bool is_busy();
// For tests and benchmarks: whatever is found out of others, or nothing to find out again.
void set_busy(std::optional<bool> busy);

// Where threads may be kept from running, each gets so many tasks, of which it holds but one at a time.
inline constexpr int64_t kTasksPerThread = 8;
inline int64_t tasks_for(int64_t threads) { return is_busy() ? threads * kTasksPerThread : threads; }

// The tasks of a region, by number.
class Tasks {
 public:
  // The first `given` of them are for threads by their number.
  Tasks(int64_t count, int64_t given) : count_(count), next_(given) {}

  bool are_left() const { return next_.load(std::memory_order_relaxed) < count_; }
  // The next that nobody has; count() or more when there is none.
  int64_t take() { return next_.fetch_add(1, std::memory_order_relaxed); }
  void drop() { next_.store(count_, std::memory_order_relaxed); }
  int64_t count() const { return count_; }

 private:
  const int64_t count_;
  std::atomic<int64_t> next_;
};

// What one thread has of them: those that it was given, then what is left.
class Share {
 public:
  Share(Tasks& tasks, int64_t first, int64_t last) : tasks_(tasks), given_(first), last_(last) {}

  bool take(int64_t& task) {
    task = given_ < last_ ? given_++ : tasks_.take();
    return task < tasks_.count();
  }

 private:
  Tasks& tasks_;
  int64_t given_;
  const int64_t last_;
};

// Calls work(share) in up to so many threads at once, the caller's among them; each works until its share has
// no task any more. Which thread gets a task, and how many work, must change no bit. Returns when every task
// is done. What `work` throws is thrown again, the first of it, and tasks that nobody has begun are left.
// Inside of another region, and where another caller has our own threads, all are the caller's. `work` must
// not call torch's parallel ops.
void run_tasks(int64_t tasks, int64_t threads, c10::function_ref<void(Share&)> work);

// Calls body(from, to) for parts of [begin, end), that are no smaller than `grain` but for the last.
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
