// For wheels: functions that newer versions of glibc and libstdc++ export under two versions, as the older
// one. A linker takes the newest version that the machine of the build has, which the machine of a user may
// lack. tools/wheels.py links this file into each library and refuses any other symbol that is too new.

#include <cxxabi.h>

#include <exception>
#include <new>
#include <sstream>
#include <string>

#if defined(__x86_64__)
#  define PEFT_KERNELS_GLIBC "GLIBC_2.2.5"
#elif defined(__aarch64__)
#  define PEFT_KERNELS_GLIBC "GLIBC_2.17"
#endif

extern "C" {

double old_exp(double);
double old_log(double);
double old_pow(double, double);
int old_trylock(void*);
void old_wait(void*, void*);
__asm__(".symver old_exp,exp@" PEFT_KERNELS_GLIBC);
__asm__(".symver old_log,log@" PEFT_KERNELS_GLIBC);
__asm__(".symver old_pow,pow@" PEFT_KERNELS_GLIBC);
__asm__(".symver old_trylock,pthread_mutex_trylock@" PEFT_KERNELS_GLIBC);
__asm__(".symver old_wait,_ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE@GLIBCXX_3.4.11");

// Under other names in C++: the compiler has its own declarations of these.
double new_exp(double x) __asm__("exp");
double new_log(double x) __asm__("log");
double new_pow(double x, double y) __asm__("pow");
int new_trylock(void* mutex) __asm__("pthread_mutex_trylock");
void new_wait(void* condition,
              void* lock) __asm__("_ZNSt18condition_variable4waitERSt11unique_lockISt5mutexE");
double new_exp(double x) { return old_exp(x); }
double new_log(double x) { return old_log(x); }
double new_pow(double x, double y) { return old_pow(x, y); }
int new_trylock(void* mutex) { return old_trylock(mutex); }
void new_wait(void* condition, void* lock) { old_wait(condition, lock); }

// What std::stringbuf::str is called since C++20, and before.
std::string old_str(const std::stringbuf* buffer) __asm__(
    "_ZNKSt7__cxx1115basic_stringbufIcSt11char_traitsIcESaIcEE3strEv");
std::string new_str(const std::stringbuf* buffer) __asm__(
    "_ZNKRSt7__cxx1115basic_stringbufIcSt11char_traitsIcESaIcEE3strEv");
std::string new_str(const std::stringbuf* buffer) { return old_str(buffer); }

// An allocator of too many elements calls this.
[[noreturn]] void new_throw() __asm__("_ZSt28__throw_bad_array_new_lengthv");
void new_throw() { throw std::bad_array_new_length(); }

// Since version 14 gcc calls this where an exception leaves a noexcept function.
[[noreturn]] void __cxa_call_terminate(void* exception) {
  abi::__cxa_begin_catch(exception);
  std::terminate();
}

// Whether shared_ptr may count without atomics; glibc before 2.32 does not tell.
char __libc_single_threaded = 0;
}
