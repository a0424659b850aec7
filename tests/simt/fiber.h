// Stacks to run functions on, and the switch between them. swapcontext would do, but makes a system call.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>

#if !defined(__x86_64__) && !defined(PEFT_KERNELS_SIMT_UCONTEXT)
#  define PEFT_KERNELS_SIMT_UCONTEXT
#endif
#ifdef PEFT_KERNELS_SIMT_UCONTEXT
#  include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#  include <sanitizer/asan_interface.h>
#  include <sanitizer/common_interface_defs.h>
#endif

namespace peft_kernels::simt {

// Something to switch to: a fiber, or the thread that started them.
struct Context {
#ifdef PEFT_KERNELS_SIMT_UCONTEXT
  ucontext_t registers;
#else
  void* stack_pointer = nullptr;
#endif
  const void* stack = nullptr;
  size_t stack_bytes = 0;
  void* fake_stack = nullptr;  // AddressSanitizer's
};

#ifndef PEFT_KERNELS_SIMT_UCONTEXT
extern "C" void peft_kernels_simt_switch(void** save, void* load);
// Callee-saved registers go to the stack; the rest is dead at a call.
asm(R"(
  .text
  .p2align 4
  .hidden peft_kernels_simt_switch
  .type peft_kernels_simt_switch, @function
  .globl peft_kernels_simt_switch
peft_kernels_simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size peft_kernels_simt_switch, . - peft_kernels_simt_switch
)");
#endif

inline Context* switched_from = nullptr;

// What a fiber has to do first when it runs (again).
inline void arrived(Context& self) {
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_finish_switch_fiber(self.fake_stack, &switched_from->stack, &switched_from->stack_bytes);
#else
  (void)self;
#endif
}

inline void switch_context(Context& from, Context& to) {
  switched_from = &from;
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack, to.stack_bytes);
#endif
#ifdef PEFT_KERNELS_SIMT_UCONTEXT
  swapcontext(&from.registers, &to.registers);
#else
  peft_kernels_simt_switch(&from.stack_pointer, to.stack_pointer);
#endif
  arrived(from);
}

// A stack with a page below it that nobody may touch.
class Stack {
 public:
  Stack() {
    void* start =
        mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (start == MAP_FAILED) throw std::bad_alloc();
    start_ = static_cast<char*>(start);
    mprotect(start_, static_cast<size_t>(sysconf(_SC_PAGESIZE)), PROT_NONE);
  }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;
  ~Stack() { munmap(start_, kBytes); }

  // Makes `context` one that begins with `entry`, which never returns. Stacks of different `color` use
  // different sets of the caches.
  void prepare(Context& context, void (*entry)(), int color) {
    char* top = start_ + kBytes - (color % 32) * 832;
    context.stack = start_;
    context.stack_bytes = static_cast<size_t>(top - start_);
    context.fake_stack = nullptr;
#ifdef __SANITIZE_ADDRESS__
    // An abandoned fiber's frames.
    __asan_unpoison_memory_region(start_, kBytes);
#endif
#ifdef PEFT_KERNELS_SIMT_UCONTEXT
    getcontext(&context.registers);
    context.registers.uc_stack.ss_sp = start_;
    context.registers.uc_stack.ss_size = context.stack_bytes;
    makecontext(&context.registers, entry, 0);
#else
    // Six registers, where to return to, and a return address of `entry` that ends backtraces.
    void* frame[8] = {nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr};
    std::memcpy(&frame[6], &entry, sizeof(entry));
    context.stack_pointer = top - sizeof(frame);
    std::memcpy(context.stack_pointer, frame, sizeof(frame));
#endif
  }

 private:
  static constexpr size_t kBytes = 256 << 10;
  char* start_;
};

}  // namespace peft_kernels::simt
