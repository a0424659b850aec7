// Device primitives that CUDA C++ lacks: instructions without an intrinsic, loads and stores of whole
// vectors, and 16-bit floats as bits.
//
// launched by launch.cuh. Grids, blocks and threads have one dimension.
//
// Shared memory is dynamic: shared_memory<T>() is its start, 16-byte aligned, T a struct of arrays no larger
// than the size passed to launch(). All 32 lanes of a warp must call a collective (shuffles, ballots, matrix
// instructions) together. Constant tables are DEVICE_TABLEs, read like any array.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#define DEVICE __device__ __forceinline__
#define DEVICE_TABLE [[maybe_unused]] static __constant__ const

namespace peft_kernels::cuda {

inline constexpr int kWarp = 32;
inline constexpr unsigned kAllLanes = ~0u;  // of a warp, for shuffles and ballots

// 16-bit floats as bits: kernels only convert them.
struct alignas(2) bf16 {
  uint16_t bits;
};
struct alignas(2) fp16 {
  uint16_t bits;
};

// The unit of one load or store.
template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  T v[N];
};
using Words2 = Vec<uint32_t, 2>;
using Words4 = Vec<uint32_t, 4>;

template <class To, class From>
DEVICE To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast: sizes differ");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

// ---- Indices ------------------------------------------------------------------------------------------

DEVICE int thread_index() { return threadIdx.x; }
DEVICE int block_index() { return blockIdx.x; }
DEVICE int grid_size() { return gridDim.x; }
DEVICE int lane_index() { return threadIdx.x & (kWarp - 1); }
// The shuffle makes it known to be uniform: values that depend on it stay in uniform registers.
DEVICE int warp_index() { return __shfl_sync(kAllLanes, threadIdx.x / kWarp, 0); }

// ---- Shuffles -----------------------------------------------------------------------------------------

// The value of the lane in quad g with the same position as the caller. One instruction, for which there is
// no intrinsic.
DEVICE uint32_t shuffle_from_quad(uint32_t value, int g) {
  uint32_t r;
  asm volatile("shfl.sync.idx.b32 %0, %1, %2, 0x31f, 0xffffffff;" : "=r"(r) : "r"(value), "r"(4 * g));
  return r;
}

// ---- Memory -------------------------------------------------------------------------------------------
// T: a Vec or a scalar of 1, 2, 4, 8 or 16 bytes, aligned to its size.

namespace detail {
template <class T>
using Raw = std::conditional_t<
    sizeof(T) == 16, uint4,
    std::conditional_t<sizeof(T) == 8, uint2,
                       std::conditional_t<sizeof(T) == 4, uint32_t,
                                          std::conditional_t<sizeof(T) == 2, uint16_t, uint8_t> > > >;
}  // namespace detail

template <class T>
DEVICE T load(const T* p) {
  // Copied first: through a reference to memory, bit_cast() would lose the alignment and load single bytes.
  const auto raw = *reinterpret_cast<const detail::Raw<T>*>(p);
  return bit_cast<T>(raw);
}
// From global memory that is not written while the kernel runs.
template <class T>
DEVICE T load_constant(const T* p) {
  return bit_cast<T>(__ldg(reinterpret_cast<const detail::Raw<T>*>(p)));
}
// The same, for data read once: not allocated in L1, first to be evicted from L2.
template <class T>
DEVICE T load_once(const T* p) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "load_once: 4, 8 or 16 bytes");
  if constexpr (sizeof(T) == 4) {
    uint32_t r;
    asm volatile("ld.global.nc.L1::no_allocate.b32 %0, [%1];" : "=r"(r) : "l"(p));
    return bit_cast<T>(r);
  } else if constexpr (sizeof(T) == 8) {
    uint2 r;
    asm volatile("ld.global.nc.L1::no_allocate.v2.b32 {%0, %1}, [%2];" : "=r"(r.x), "=r"(r.y) : "l"(p));
    return bit_cast<T>(r);
  } else {
    uint4 r;
    asm volatile("ld.global.nc.L1::no_allocate.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r.x), "=r"(r.y), "=r"(r.z), "=r"(r.w)
                 : "l"(p));
    return bit_cast<T>(r);
  }
}
template <class T>
DEVICE void store(T* p, const T& value) {
  *reinterpret_cast<detail::Raw<T>*>(p) = bit_cast<detail::Raw<T> >(value);
}

template <class T>
DEVICE T* shared_memory() {
  extern __shared__ uint4 start[];
  return reinterpret_cast<T*>(start);
}
// The 32-bit address of shared memory, for load_shared(). A kernel's first address depends on the card.
DEVICE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }
DEVICE uint32_t load_shared(uint32_t address) {
  uint32_t r;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(r) : "r"(address) : "memory");
  return r;
}

// ---- Asynchronous copies, global to shared ------------------------------------------------------------

// Copies 16 bytes, both sides aligned; if not `valid`, writes zeros and does not read the source. The data is
// visible to this thread after copy_async_wait, to others after a barrier that follows it.
DEVICE void copy_async_16(void* to_shared, const void* from, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to_shared)), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
}
DEVICE void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Waits until at most kPending of this thread's committed groups are in flight.
template <int kPending>
DEVICE void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// ---- Matrix instructions ------------------------------------------------------------------------------
// g = lane / 4, t = lane % 4; the lower index of a pair in the low half.
//
// volatile although they only compute: all lanes must execute them together, and a non-volatile one may be
// moved to where its result is used, which can be a divergent branch.

// c[16, 8] += a[16, 16] b[16, 8].  a: (g, 2t..), (g + 8, 2t..), (g, 2t + 8..), (g + 8, 2t + 8..);
// b: rows 2t.. and 2t + 8.. of column g;  c: (g, 2t..), (g + 8, 2t..). T is bf16 or fp16.
template <class T>
DEVICE void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
DEVICE void mma<bf16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
DEVICE void mma<fp16>(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// c[16, 8] += a[16, 8] b[8, 8] in tf32: the upper 19 bits of each float. a: (g, t), (g + 8, t), (g, t + 4),
// (g + 8, t + 4); b: rows t and t + 4 of column g; c as above.
DEVICE void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// ---- Bits and numbers ---------------------------------------------------------------------------------

// The bits of a where the mask has ones, else those of b. One instruction; compilers emit two.
DEVICE uint32_t select_bits(uint32_t mask, uint32_t a, uint32_t b) {
  uint32_t r;
  asm("lop3.b32 %0, %1, %2, %3, 0xe4;" : "=r"(r) : "r"(a), "r"(b), "r"(mask));
  return r;
}

// Approximate 1 / x of a normal number, within one unit in the last place.
DEVICE float reciprocal(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

// Approximate 2^x, within two units in the last place; 0 where that is below 2^-126.
DEVICE float exp2_approximate(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(bf16 x) { return __uint_as_float(uint32_t{x.bits} << 16); }
DEVICE float to_float(fp16 x) { return __half2float(__ushort_as_half(x.bits)); }

// Rounds to nearest, ties to even.
template <class T>
DEVICE T from_float(float x);
template <>
DEVICE float from_float<float>(float x) {
  return x;
}
template <>
DEVICE bf16 from_float<bf16>(float x) {
  return {__bfloat16_as_ushort(__float2bfloat16_rn(x))};
}
template <>
DEVICE fp16 from_float<fp16>(float x) {
  return {__half_as_ushort(__float2half_rn(x))};
}

// Two 16-bit floats in a register, `low` in the low half.
template <class T>
DEVICE uint32_t pack2(float low, float high);
template <>
DEVICE uint32_t pack2<bf16>(float low, float high) {
  return bit_cast<uint32_t>(__floats2bfloat162_rn(low, high));
}
template <>
DEVICE uint32_t pack2<fp16>(float low, float high) {
  return bit_cast<uint32_t>(__floats2half2_rn(low, high));
}
template <class T>
DEVICE float low_half(uint32_t pair) {
  return to_float(T{static_cast<uint16_t>(pair)});
}
template <class T>
DEVICE float high_half(uint32_t pair) {
  return to_float(T{static_cast<uint16_t>(pair >> 16)});
}
// a * b of two pairs, each result rounded once. For bf16 as a * b - 0, which sm_80 supports.
template <class T>
DEVICE uint32_t multiply2(uint32_t a, uint32_t b);
template <>
DEVICE uint32_t multiply2<bf16>(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(0x80008000u));
  return r;
}
template <>
DEVICE uint32_t multiply2<fp16>(uint32_t a, uint32_t b) {
  uint32_t r;
  asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

// ---- Between blocks -----------------------------------------------------------------------------------

// Adds to a counter in global memory and returns its previous value, with acquire and release semantics: the
// caller's earlier writes are visible to blocks that see the sum, and theirs to the caller.
DEVICE uint32_t atomic_add_ordered(uint32_t* counter, uint32_t value) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.add.u32 %0, [%1], %2;"
               : "=r"(before)
               : "l"(counter), "r"(value)
               : "memory");
  return before;
}

}  // namespace peft_kernels::cuda
