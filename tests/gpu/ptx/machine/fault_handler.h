// Catches segmentation faults of kernels during its lifetime.
#pragma once

#include <setjmp.h>
#include <signal.h>

namespace ptx {

class FaultHandler {
 public:
  // On a fault, sets `address` and jumps to `jump`, unless `is_ours` says that another thread caused it.
  FaultHandler(bool (*is_ours)(), sigjmp_buf& jump, const void*& address) {
    callback = is_ours;
    to = &jump;
    where = &address;
    struct sigaction action = {};
    action.sa_sigaction = handle;
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    if (kEnabled) {
      sigaction(SIGSEGV, &action, &segv_);
      sigaction(SIGBUS, &action, &bus_);
    }
  }
  FaultHandler(const FaultHandler&) = delete;
  FaultHandler& operator=(const FaultHandler&) = delete;
  ~FaultHandler() {
    if (kEnabled) {
      sigaction(SIGSEGV, &segv_, nullptr);
      sigaction(SIGBUS, &bus_, nullptr);
    }
  }

 private:
#ifdef __SANITIZE_ADDRESS__
  static constexpr bool kEnabled = false;  // its handler reports more
#else
  static constexpr bool kEnabled = true;
#endif

  static void handle(int number, siginfo_t* info, void*) {
    if (callback()) {
      *where = info->si_addr;
      siglongjmp(*to, 1);
    }
    // The access is retried, and ends the process.
    signal(number, SIG_DFL);
  }

  static inline bool (*callback)() = nullptr;
  static inline sigjmp_buf* to = nullptr;
  static inline const void** where = nullptr;
  struct sigaction segv_ = {}, bus_ = {};
};

}  // namespace ptx
