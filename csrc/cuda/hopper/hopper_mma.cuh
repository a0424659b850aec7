// The matrix instructions of a warpgroup: d[64, tokens] += a[64, 16] b[16, tokens], asynchronous.
//
// a is in registers: warp w of the four has rows 16w .. 16w + 15, in the layout of mma() in device.cuh. b is
// in shared memory: rows of `tokens` by 64 elements of k, 128 bytes each, swizzled as TMA does by 128 bytes,
// at a multiple of 1024. d is in registers, eight tokens after another in the layout of mma().
//
// Registers of a and d belong to the instruction from multiply_start() to the multiply_wait() that awaits it.
#pragma once

#include "hopper.cuh"

namespace peft_kernels::cuda {

#ifdef PEFT_KERNELS_HOPPER

// Before the first instruction, and whenever registers were written since the last one.
DEVICE void multiply_start() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
// Ends a group of instructions.
DEVICE void multiply_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most kPending of the groups are in flight.
template <int kPending>
DEVICE void multiply_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Sums to start from. Of zeros that the compiler knows of, it makes copies between instructions, which ptxas
// then serialises.
template <int kCount>
DEVICE void multiply_zeros(float (&sums)[kCount]) {
#  pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("mov.f32 %0, 0f00000000;" : "=f"(sums[i]));
}
// Waits for all groups, the sums of which can then be used. To the compiler the sums are written here:
// otherwise it could use registers of d earlier.
template <int kCount>
DEVICE void multiply_finish(float (&sums)[kCount]) {
  multiply_wait<0>();
#  pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(sums[i])::"memory");
}

// Describes b: 8 rows are 1024 bytes. A step of 16 along k adds kDescriptorStep.
DEVICE uint64_t describe_rows(uint32_t address) {
  constexpr uint64_t kSwizzle128 = uint64_t{1} << 62, kEightRows = uint64_t{1024 >> 4} << 32;
  constexpr uint64_t kUnused = uint64_t{1} << 16;
  return kSwizzle128 | kEightRows | kUnused | (address & 0x3ffff) >> 4;
}
inline constexpr int kDescriptorStep = 16 * 2 >> 4;

// T is bf16 or fp16, kTokens 64, 128 or 256.
template <class T, int kTokens>
DEVICE void multiply_async(float (&d)[kTokens / 2], const uint32_t (&a)[4], uint64_t b);

// clang-format off
// Registers cannot be indexed in assembly, so they are all named.
#define PK_4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define PK_16(i) PK_4(i), PK_4(i + 4), PK_4(i + 8), PK_4(i + 12)
#define PK_32(i) PK_16(i), PK_16(i + 16)
#define PK_64(i) PK_32(i), PK_32(i + 32)
#define PK_NAMES_64 \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define PK_NAMES_128 PK_NAMES_64 ", " \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define PK_NAMES_256 PK_NAMES_128 ", " \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, " \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, " \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, " \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
// `operands` names a and b; the last arguments are the sums.
#define PK_MULTIPLY(T, type, tokens, operands, ...) \
  template <> \
  DEVICE void multiply_async<T, tokens>(float (&d)[tokens / 2], const uint32_t (&a)[4], uint64_t b) { \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #tokens "k16.f32." type "." type \
                 " {" PK_NAMES_##tokens "}, " operands ", 1, 1, 1, 0;" \
                 : __VA_ARGS__ : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)); \
  }
#define PK_MULTIPLY_BOTH(tokens, operands, ...) \
  PK_MULTIPLY(bf16, "bf16", tokens, operands, __VA_ARGS__) \
  PK_MULTIPLY(fp16, "f16", tokens, operands, __VA_ARGS__)
PK_MULTIPLY_BOTH(64, "{%32, %33, %34, %35}, %36", PK_32(0))
PK_MULTIPLY_BOTH(128, "{%64, %65, %66, %67}, %68", PK_64(0))
PK_MULTIPLY_BOTH(256, "{%128, %129, %130, %131}, %132", PK_64(0), PK_64(64))
#undef PK_MULTIPLY_BOTH
#undef PK_MULTIPLY
#undef PK_NAMES_64
#undef PK_NAMES_128
#undef PK_NAMES_256
#undef PK_64
#undef PK_32
#undef PK_16
#undef PK_4
// clang-format on

#endif

}  // namespace peft_kernels::cuda
