// Device primitives that only compute capability 9.0 has (sm_90a): barriers in shared memory, copies of whole
// tiles by the tensor memory accelerator (TMA), and matrix instructions of four warps (hopper_mma.cuh).
//
// Addresses of shared memory are 32 bits, of shared_address().
#pragma once

#include <cuda.h>

#include "../core/device.cuh"

// Defined where code is compiled for sm_90a, the only target of these instructions.
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#  define PEFT_KERNELS_HOPPER 1
#endif

namespace peft_kernels::cuda {

inline constexpr int kWarpgroup = 4 * kWarp;

#ifdef PEFT_KERNELS_HOPPER

// ---- Barriers -----------------------------------------------------------------------------------------
// A barrier is 8 bytes. It completes a phase when `count` threads have arrived and the bytes expected in the
// phase have been copied. The parity of the first phase is 0.

DEVICE void init_barrier(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
// Makes initialised barriers visible to copies; a block barrier must follow for other threads.
DEVICE void fence_barrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
DEVICE void arrive_expecting(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes)
               : "memory");
}
// Waits for the end of the phase with that parity.
DEVICE void wait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile(
        "{ .reg .pred done;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.u32 %0, 1, 0, done; }"
        : "=r"(done)
        : "r"(barrier), "r"(parity)
        : "memory");
  } while (done == 0);
}
// A barrier of some warps of a block, by index: 0 is that of __syncthreads().
template <int kIndex, int kThreads>
DEVICE void sync_threads() {
  asm volatile("bar.sync %0, %1;" ::"n"(kIndex), "n"(kThreads) : "memory");
}

// ---- Shared memory by address -------------------------------------------------------------------------

DEVICE Words4 load_shared_16(uint32_t address) {
  Words4 r;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(r.v[0]), "=r"(r.v[1]), "=r"(r.v[2]), "=r"(r.v[3])
               : "r"(address)
               : "memory");
  return r;
}
DEVICE Words2 load_shared_8(uint32_t address) {
  Words2 r;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(r.v[0]), "=r"(r.v[1]) : "r"(address) : "memory");
  return r;
}
// Four matrices of 8 rows by 8 pairs of bytes, transposed: lane 8 j + r has the address of row r of matrix j,
// and word j of lane (g, t) is the pair g of the rows 2t and, in the upper half, 2t + 1. Called by all lanes.
DEVICE Words4 load_transposed(uint32_t address) {
  Words4 r;
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r.v[0]), "=r"(r.v[1]), "=r"(r.v[2]), "=r"(r.v[3])
               : "r"(address)
               : "memory");
  return r;
}

// ---- Copies -------------------------------------------------------------------------------------------

// Copies a box of a matrix, as the map describes it, from column x and row y on. Called by one thread; what
// lies outside of the matrix is zeros, and counts as copied.
DEVICE void copy_box(uint32_t to, const CUtensorMap& map, int x, int y, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, "
      "%3}], "
      "[%4];" ::"r"(to),
      "l"(&map), "r"(x), "r"(y), "r"(barrier)
      : "memory");
}

// ---- Registers ----------------------------------------------------------------------------------------

// All warps of a warpgroup give registers back, or take some that others gave back.
template <int kRegisters>
DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

#endif

}  // namespace peft_kernels::cuda
