// Segmentation faults of kernels, as long as it lives.
#pragma once

#include <signal.h>

namespace peft_kernels::simt {

class FaultHandler {
 public:
  // `on_fault` gets the address and returns false when the fault is none of its own.
  explicit FaultHandler(bool (*on_fault)(const void*)) {
    callback = on_fault;
    struct sigaction action = {};
    action.sa_sigaction = handle;
    // on_fault may leave by switching stacks, so nothing ends the signal.
    action.sa_flags = SA_SIGINFO | SA_NODEFER;
    if (kEnabled) sigaction(SIGSEGV, &action, &before_);
  }
  FaultHandler(const FaultHandler&) = delete;
  FaultHandler& operator=(const FaultHandler&) = delete;
  ~FaultHandler() {
    if (kEnabled) sigaction(SIGSEGV, &before_, nullptr);
  }

 private:
#ifdef __SANITIZE_ADDRESS__
  static constexpr bool kEnabled = false;  // its own handler says more
#else
  static constexpr bool kEnabled = true;
#endif

  static void handle(int number, siginfo_t* info, void*) {
    // The access is tried again, and ends the process.
    if (!callback(info->si_addr)) signal(number, SIG_DFL);
  }

  static inline bool (*callback)(const void*) = nullptr;
  struct sigaction before_ = {};
};

}  // namespace peft_kernels::simt
