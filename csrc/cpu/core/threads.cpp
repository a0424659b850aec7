#include "threads.h"

#include <ATen/Parallel.h>

#include <condition_variable>
#include <exception>
#include <mutex>
#include <system_error>
#include <thread>
#ifdef __linux__
#  include <pthread.h>
#  include <time.h>
#endif
#ifdef _OPENMP
#  include <omp.h>
#endif

namespace peft_kernels::cpu {
namespace {

#ifdef __SANITIZE_THREAD__
// ThreadSanitizer does not see libgomp's barriers and reports races on what OpenMP orders.
constexpr bool kOwnThreadsOnly = true;
#else
constexpr bool kOwnThreadsOnly = false;
#endif

// Nanoseconds of wall-clock time, and of CPU time of this thread.
struct Clocks {
  int64_t wall, ran;

#ifdef __linux__
  static int64_t read(clockid_t clock) {
    timespec t{};
    clock_gettime(clock, &t);
    return t.tv_sec * int64_t{1'000'000'000} + t.tv_nsec;
  }
  static int64_t on_wall() { return read(CLOCK_MONOTONIC); }
  static Clocks now() { return {on_wall(), read(CLOCK_THREAD_CPUTIME_ID)}; }
#else
  static int64_t on_wall() { return 0; }
  static Clocks now() { return {0, 0}; }
#endif
};
constexpr int64_t kMicrosecond = 1000, kMillisecond = 1000 * kMicrosecond;

// Waking a thread takes less than this. A thread that is away for longer is kept from running by another
// process.
constexpr int64_t kWakeLatency = 200 * kMicrosecond;

thread_local bool in_region = false;
struct InRegion {
  InRegion() { in_region = true; }
  ~InRegion() { in_region = false; }
};

struct Region {
  Tasks tasks;
  const c10::function_ref<void(Share&)> work;
  const int64_t began;  // wall clock; 0: not measured
  std::atomic<int64_t> lost{0};
  std::mutex error_mutex{};
  std::exception_ptr error{};

  void add_lost_time(int64_t nanoseconds) {
    if (nanoseconds > kWakeLatency) lost.fetch_add(nanoseconds, std::memory_order_relaxed);
  }
  void participate(int64_t first, int64_t last) {
    const int64_t ran = began ? Clocks::now().ran : 0;
    try {
      const InRegion inside;
      Share share(tasks, first, last);
      work(share);
    } catch (...) {
      tasks.drop();
      const std::lock_guard<std::mutex> lock(error_mutex);
      if (!error) error = std::current_exception();
    }
    if (!began) return;
    const Clocks end = Clocks::now();
    add_lost_time((end.wall - began) - (end.ran - ran));
  }
};

// Our own threads, which sleep between regions. They are never joined, as that would delay the exit.
class Workers {
 public:
  // nullopt when another caller is using the threads. Else how many of the requested threads never joined.
  std::optional<int64_t> run(Region& region, int64_t threads) {
    std::unique_lock<std::mutex> lock(mutex_);
    if (region_) return std::nullopt;
    grow(threads - 1);
    region_ = &region;
    open_ = std::min(threads - 1, count_);
    lock.unlock();
    for (int64_t i = 1; i < threads; ++i) wake_.notify_one();
    region.participate(0, 0);
    lock.lock();
    const int64_t missing = open_;
    open_ = 0;
    left_.wait(lock, [this] { return inside_ == 0; });
    region_ = nullptr;
    return missing;
  }

 private:
  void grow(int64_t count) {
    try {
      for (; count_ < count; ++count_) std::thread([this] { serve(); }).detach();
    } catch (const std::system_error&) {  // no further threads available: use those that there are
    }
  }
  [[noreturn]] void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return open_ > 0 && region_->tasks.any_left(); });
      --open_;
      ++inside_;
      Region& region = *region_;
      lock.unlock();
      region.participate(0, 0);
      lock.lock();
      if (--inside_ == 0) left_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, left_;
  Region* region_ = nullptr;
  int64_t count_ = 0, open_ = 0, inside_ = 0;
};

// Keeps the threads of GNU OpenMP, which torch's own ops run in, from spinning while they wait. libgomp reads
// GOMP_SPINCOUNT once, before anybody can set it, but stops spinning when there are more OpenMP threads than
// processors. So while this is on, a second team of that many threads sleeps.
class SpinSuppressor {
 public:
  void set(bool on) {
#ifdef _OPENMP
    const std::lock_guard<std::mutex> lock(mutex_);
    if (on == on_) return;
    on_ = on;
    change_.notify_all();
    ++generation_;
    if (!on) return;
    const int count = std::max(omp_get_num_procs() - at::get_num_threads(), 0) + 2;
    try {
      std::thread([this, count, generation = generation_] { hold(count, generation); }).detach();
    } catch (const std::system_error&) {  // no further threads available
    }
#else
    (void)on;
#endif
  }

 private:
#ifdef _OPENMP
  // The team exists as long as the thread that created it.
  void hold(int count, int64_t generation) {
    std::atomic<int> members{0};  // the compiler would drop an empty region
#  pragma omp parallel num_threads(count)
    members.fetch_add(1, std::memory_order_relaxed);
    std::unique_lock<std::mutex> lock(mutex_);
    change_.wait(lock, [this, generation] { return generation_ != generation; });
  }

  std::mutex mutex_;
  std::condition_variable change_;
  int64_t generation_ = 0;
  bool on_ = false;
#endif
};

// Measures a sample of the regions to find out whether other processes keep our threads from running.
class ContentionMonitor {
 public:
  bool is_busy() const { return busy_.load(std::memory_order_relaxed); }

  // The wall-clock time if the region that begins now is to be measured, else 0.
  int64_t begin() {
    const int64_t now = Clocks::on_wall();
    if (now - last_.load(std::memory_order_relaxed) < kPause) return 0;
    last_.store(now, std::memory_order_relaxed);
    return now;
  }
  void end(const Region& region, int64_t threads) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock) return;
    wanted_ += (Clocks::on_wall() - region.began) * threads;
    lost_ += region.lost.load(std::memory_order_relaxed);
    if (wanted_ < kWindow * threads) return;
    const double part = static_cast<double>(lost_) / static_cast<double>(wanted_);
    wanted_ = lost_ = 0;
    quiet_windows_ = part < kQuiet ? quiet_windows_ + 1 : 0;
    if (forced_ || kOwnThreadsOnly) return;
    if (!is_busy() && part > kBusy) change(true);
    if (is_busy() && quiet_windows_ >= kQuietWindows) change(false);
  }
  void force(std::optional<bool> busy) {
    const std::lock_guard<std::mutex> lock(mutex_);
    forced_ = busy;
    wanted_ = lost_ = quiet_windows_ = 0;
    if (busy && !kOwnThreadsOnly) change(*busy);
  }

 private:
  // Between measured regions: reading the clocks costs a third of a microsecond.
  static constexpr int64_t kPause = 500 * kMicrosecond;
  static constexpr int64_t kWindow = 50 * kMillisecond;
  // Shares of the requested thread time that are lost: 0.2 to 0.7 with one neighbour on two cores, up to 0.04
  // on a quiet machine, up to 0.07 there with our sleeping threads. These cost a tenth of a step on a quiet
  // machine, OpenMP's a multiple of the step on a busy one: so it must stay quiet for a while before
  // switching back.
  static constexpr double kBusy = 0.15, kQuiet = 0.1;
  static constexpr int64_t kQuietWindows = 20;

  void change(bool busy) {
    spin_suppressor_.set(busy);
    busy_.store(busy, std::memory_order_relaxed);
  }

  std::atomic<bool> busy_{kOwnThreadsOnly};
  std::atomic<int64_t> last_{0};
  std::mutex mutex_;
  int64_t wanted_ = 0, lost_ = 0, quiet_windows_ = 0;
  std::optional<bool> forced_;
  SpinSuppressor spin_suppressor_;
};

// Never destroyed, as threads wait in it. A forked process has none of these threads, and gets a new State.
struct State {
  ContentionMonitor monitor;
  Workers workers;
};
std::atomic<State*> current{nullptr};

State& state() {
  static const bool once = [] {
    current.store(new State);
#ifdef __linux__
    pthread_atfork(nullptr, nullptr, [] { current.store(new State); });
#endif
    return true;
  }();
  (void)once;
  return *current.load(std::memory_order_acquire);
}

void run_alone(int64_t count, c10::function_ref<void(Share&)> work) {
  Tasks tasks(count, count);
  Share share(tasks, 0, count);
  work(share);
}

}  // namespace

int64_t get_num_threads() {
  const int64_t threads = at::get_num_threads();
  // Tests under sanitizers set one torch thread, as sanitizers cannot judge torch's own ops.
  return kSanitized && threads == 1 ? 4 : threads;
}

bool is_busy() { return state().monitor.is_busy(); }
void set_busy(std::optional<bool> busy) { state().monitor.force(busy); }

void run_tasks(int64_t tasks, int64_t threads, c10::function_ref<void(Share&)> work) {
  threads = std::min(threads, tasks);
  if (threads <= 1 || in_region || at::in_parallel_region()) {
    if (tasks > 0) run_alone(tasks, work);
    return;
  }
  auto& [monitor, workers] = state();
  const bool busy = monitor.is_busy();
  Region region{Tasks(tasks, busy ? 0 : threads), work, monitor.begin()};
  if (busy) {
    const auto missing = workers.run(region, threads);
    if (!missing) {
      const InRegion inside;
      return run_alone(tasks, work);
    }
    // A thread that nothing keeps from running has begun by now.
    if (region.began) region.add_lost_time((Clocks::on_wall() - region.began) * *missing);
  } else {
    at::parallel_for(0, threads, 1, [&](int64_t first, int64_t last) { region.participate(first, last); });
  }
  if (region.began) monitor.end(region, threads);
  if (region.error) std::rethrow_exception(region.error);
}

}  // namespace peft_kernels::cpu
