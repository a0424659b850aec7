#include "isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#  include <cpuid.h>
#  if defined(__linux__)
#    include <sys/syscall.h>
#    include <unistd.h>
#  endif
#endif

namespace peft_kernels::cpu {
namespace {

struct Level {
  const char* name;
  const KernelTable* kernels;  // null when it is not built
};

#if defined(__x86_64__)
#  define PEFT_KERNELS_X86(table) &table
#else
#  define PEFT_KERNELS_X86(table) nullptr
#endif
#if PEFT_KERNELS_EMULATE
#  define PEFT_KERNELS_EMULATED(table) PEFT_KERNELS_X86(table)
#else
#  define PEFT_KERNELS_EMULATED(table) nullptr
#endif

constexpr Level kLevels[kIsaCount + 1] = {
    {"scalar", &scalar::kKernels},
    {"avx2", PEFT_KERNELS_X86(avx2::kKernels)},
    {"avx512", PEFT_KERNELS_X86(avx512::kKernels)},
    {"avx512_bf16", PEFT_KERNELS_X86(avx512_bf16::kKernels)},
    {"amx", PEFT_KERNELS_X86(amx::kKernels)},
    {"amx_emulated", PEFT_KERNELS_EMULATED(amx_emulated::kKernels)},
};

#if defined(__x86_64__)

struct CpuidLeaf {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
};

CpuidLeaf cpuid(unsigned leaf, unsigned subleaf) {
  CpuidLeaf out;
  __get_cpuid_count(leaf, subleaf, &out.eax, &out.ebx, &out.ecx, &out.edx);
  return out;
}

bool has_bits(uint64_t value, uint64_t bits) { return (value & bits) == bits; }

// Register state that the operating system saves on a context switch. Executing AVX without it faults.
uint64_t enabled_state() {
  constexpr unsigned kOsxsave = 1u << 27;
  if (!has_bits(cpuid(1, 0).ecx, kOsxsave)) return 0;
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (uint64_t{high} << 32) | low;
}

// Linux saves tiles only for processes that ask. Null when it does, else why not.
const char* request_tiles() {
#  if defined(__linux__)
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  if (syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0) return nullptr;
  return "amx: the kernel refuses the process its tiles (arch_prctl ARCH_REQ_XCOMP_PERM)";
#  else
  return "amx: not supported on this operating system";
#  endif
}

const char* refused = nullptr;

Isa detect() {
  constexpr uint64_t kYmmState = 0x06;                   // XMM, upper YMM
  constexpr uint64_t kZmmState = 0xe6;                   // and opmask, upper ZMM, ZMM16-31
  constexpr unsigned kFma = 1u << 12, kF16c = 1u << 29;  // leaf 1, ecx
  constexpr unsigned kAvx2 = 1u << 5;                    // leaf 7, ebx
  constexpr unsigned kF = 1u << 16, kDq = 1u << 17, kBw = 1u << 30, kVl = 1u << 31;  // leaf 7, ebx
  constexpr unsigned kBf16 = 1u << 5;                                                // leaf 7.1, eax

  const uint64_t state = enabled_state();
  const CpuidLeaf leaf7 = cpuid(7, 0);
  if (!has_bits(state, kYmmState) || !has_bits(cpuid(1, 0).ecx, kFma | kF16c) ||
      !has_bits(leaf7.ebx, kAvx2)) {
    return Isa::kScalar;
  }
  if (!has_bits(state, kZmmState) || !has_bits(leaf7.ebx, kF | kDq | kBw | kVl)) return Isa::kAvx2;
  const bool has_leaf7_1 = leaf7.eax >= 1;
  if (!has_leaf7_1 || !has_bits(cpuid(7, 1).eax, kBf16)) return Isa::kAvx512;
  constexpr uint64_t kTileState = 0x60000;                      // XTILECFG, XTILEDATA
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;  // leaf 7, edx
  if (!has_bits(leaf7.edx, kAmxBf16 | kAmxTile)) return Isa::kAvx512Bf16;
  refused = has_bits(state, kTileState) ? request_tiles() : "amx: the operating system does not save tiles";
  return refused ? Isa::kAvx512Bf16 : Isa::kAmx;
}

#else

const char* const refused = nullptr;

Isa detect() { return Isa::kScalar; }

#endif

Isa best_isa() {
  static const Isa best = detect();
  return best;
}

std::atomic<const Level*> current{kLevels};

// A level by name, whether or not this machine can run it; -1 when there is no such level in any build.
int isa_by_name(const char* name) {
  for (int i = 0; i <= kIsaCount; ++i) {
    if (std::strcmp(name, kLevels[i].name) == 0) return i;
  }
  return -1;
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
  return refused;
}

const char* usable_isa_name(Isa isa) {
  if (isa > best_isa() && !(isa == Isa::kAmxEmulated && best_isa() >= Isa::kAvx512Bf16)) return nullptr;
  const Level& level = kLevels[static_cast<int>(isa)];
  return level.kernels ? level.name : nullptr;
}

const KernelTable& kernels() { return *current.load(std::memory_order_relaxed)->kernels; }
const char* isa_name() { return current.load(std::memory_order_relaxed)->name; }

bool has_fast_dense() {
  // Level amx has never been timed against torch's tiles: until then torch keeps dense weights there.
  return current.load(std::memory_order_relaxed) >= &kLevels[static_cast<int>(Isa::kAvx512Bf16)] &&
         best_isa() < Isa::kAmx && !refused;
}

bool set_isa(const char* name) {
  const int isa = isa_by_name(name);
  if (isa < 0 || !usable_isa_name(static_cast<Isa>(isa))) return false;
  current.store(&kLevels[isa], std::memory_order_relaxed);
  return true;
}

const char* select_isa_from_environment() {
  int cap = kIsaCount - 1;
  const char* name = std::getenv("PEFT_KERNELS_CPU_ISA");
  if (name && *name) {
    cap = isa_by_name(name);
    if (cap < 0) return "PEFT_KERNELS_CPU_ISA: expected scalar, avx2, avx512, avx512_bf16 or amx";
  }
  while (!usable_isa_name(static_cast<Isa>(cap))) --cap;
  current.store(&kLevels[cap], std::memory_order_relaxed);
  return nullptr;
}

void* thread_scratch() {
  thread_local Scratch scratch;
  if (!scratch.data && posix_memalign(&scratch.data, 64, kScratchBytes) != 0) scratch.data = nullptr;
  return scratch.data;
}

}  // namespace peft_kernels::cpu
