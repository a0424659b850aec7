#include <atomic>
#include <cstdlib>
#include <cstring>
#include <string>

#include "../core/kernel_table.h"
#include "fast_dense.h"

#if defined(__x86_64__)
#  include <cpuid.h>
#  if defined(__linux__)
#    include <sys/syscall.h>
#    include <unistd.h>
#  endif
#elif defined(__aarch64__) && defined(__linux__)
#  include <sys/auxv.h>
#endif

namespace peft_kernels::cpu {
namespace {

struct IsaEntry {
  const char* name;
  const KernelTable* kernels;  // null when not in this build
};

#if defined(__x86_64__)
#  define PEFT_KERNELS_X86(table) &table
#else
#  define PEFT_KERNELS_X86(table) nullptr
#endif
#if defined(__aarch64__)
#  define PEFT_KERNELS_NEON(table) &table
#else
#  define PEFT_KERNELS_NEON(table) nullptr
#endif
#if PEFT_KERNELS_HAS_NEON_BF16
#  define PEFT_KERNELS_NEON_BF16(table) &table
#else
#  define PEFT_KERNELS_NEON_BF16(table) nullptr
#endif

const IsaEntry kIsas[kIsaCount + 1] = {
    {"scalar", &scalar::kKernels},
    {"neon", PEFT_KERNELS_NEON(neon::kKernels)},
    {"neon_bf16", PEFT_KERNELS_NEON_BF16(neon_bf16::kKernels)},
    {"avx2", PEFT_KERNELS_X86(avx2::kKernels)},
    {"avx512", PEFT_KERNELS_X86(avx512::kKernels)},
    {"avx512_bf16", PEFT_KERNELS_X86(avx512_bf16::kKernels)},
    {"amx", PEFT_KERNELS_X86(amx::kKernels)},
    {"amx_emulated", PEFT_KERNELS_X86(amx_emulated::kKernels)},
};

#if defined(__x86_64__)

// Linux saves tile registers only for processes that request it. Returns null on success, else the reason.
const char* request_tiles() {
#  if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0) return nullptr;
  return "amx: the kernel refuses the process its tiles (arch_prctl ARCH_REQ_XCOMP_PERM)";
#  else
  return "amx: not supported on this operating system";
#  endif
}

const char* amx_refusal = nullptr;

// gcc's builtins ask the operating system too: where it does not save the registers, the instructions fault.
Isa detect() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  __get_cpuid(1, &eax, &ebx, &ecx, &edx);
  constexpr unsigned kF16c = 1u << 29;  // gcc 10 has no name for it
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma") || !(ecx & kF16c))
    return Isa::kScalar;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl")) {
    return Isa::kAvx2;
  }
  if (!__builtin_cpu_supports("avx512bf16") || !__builtin_cpu_supports("avx512vbmi")) return Isa::kAvx512;
  __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx);
  constexpr unsigned kAmx = 1u << 22 | 1u << 24;  // bf16, tiles
  if ((edx & kAmx) != kAmx) return Isa::kAvx512Bf16;
  amx_refusal = request_tiles();
  return amx_refusal ? Isa::kAvx512Bf16 : Isa::kAmx;
}

#else

const char* const amx_refusal = nullptr;

Isa detect() {
#  if defined(__aarch64__) && defined(__linux__)
  constexpr unsigned long kBf16 = 1ul << 14;  // HWCAP2_BF16, which older headers lack
  if (getauxval(AT_HWCAP2) & kBf16) return Isa::kNeonBf16;
#  endif
#  if defined(__aarch64__)
  return Isa::kNeon;
#  else
  return Isa::kScalar;
#  endif
}

#endif

Isa best_isa() {
  static const Isa best = detect();
  return best;
}

std::atomic<const IsaEntry*> current{kIsas};

// The index of an ISA by name, whether or not this machine can run it; -1 when it is not in this build.
int isa_by_name(const char* name) {
  for (int i = 0; i <= kIsaCount; ++i) {
    if (kIsas[i].kernels && std::strcmp(name, kIsas[i].name) == 0) return i;
  }
  return -1;
}

// What PEFT_KERNELS_CPU_ISA may be in this build.
const char* expected_names() {
  static const std::string text = [] {
    std::string names = kIsas[0].name;
    for (int i = 1; i < kIsaCount; ++i) {
      if (kIsas[i].kernels) names += std::string(", ") + kIsas[i].name;
    }
    return "PEFT_KERNELS_CPU_ISA: expected one of " + names;
  }();
  return text.c_str();
}

// As recorded in fast_dense.h, or as PEFT_KERNELS_AMX_DENSE says, which is for measuring.
bool amx_has_fast_dense() {
  static const bool is_fast = [] {
    const char* wanted = std::getenv("PEFT_KERNELS_AMX_DENSE");
    return wanted && *wanted ? *wanted == '1' : kAmxHasFastDense;
  }();
  return is_fast;
}

struct Scratch {
  void* data = nullptr;
  Scratch() = default;
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  ~Scratch() { std::free(data); }
};

}  // namespace

const char* refused_isa_reason() {
  best_isa();
  return amx_refusal;
}

const char* usable_isa_name(Isa isa) {
  if (isa > best_isa() && !(isa == Isa::kAmxEmulated && best_isa() >= Isa::kAvx512Bf16)) return nullptr;
  const IsaEntry& entry = kIsas[static_cast<int>(isa)];
  return entry.kernels ? entry.name : nullptr;
}

const KernelTable& kernels() { return *current.load(std::memory_order_relaxed)->kernels; }
const char* isa_name() { return current.load(std::memory_order_relaxed)->name; }

bool has_fast_dense() {
  // Torch uses the best instructions of the machine, so our GEMMs can be as fast only at the best ISA.
  return best_isa() >= Isa::kAvx512Bf16 && !amx_refusal &&
         (best_isa() != Isa::kAmx || amx_has_fast_dense()) &&
         current.load(std::memory_order_relaxed) >= &kIsas[static_cast<int>(best_isa())];
}

bool set_isa(const char* name) {
  const int isa = isa_by_name(name);
  if (isa < 0 || !usable_isa_name(static_cast<Isa>(isa))) return false;
  current.store(&kIsas[isa], std::memory_order_relaxed);
  return true;
}

const char* select_isa_from_environment() {
  int cap = kIsaCount - 1;
  const char* name = std::getenv("PEFT_KERNELS_CPU_ISA");
  if (name && *name) {
    cap = isa_by_name(name);
    if (cap < 0) return expected_names();
  }
  while (!usable_isa_name(static_cast<Isa>(cap))) --cap;
  current.store(&kIsas[cap], std::memory_order_relaxed);
  return nullptr;
}

void* thread_scratch() {
  thread_local Scratch scratch;
  if (!scratch.data && posix_memalign(&scratch.data, 64, kScratchBytes) != 0) scratch.data = nullptr;
  return scratch.data;
}

}  // namespace peft_kernels::cpu
