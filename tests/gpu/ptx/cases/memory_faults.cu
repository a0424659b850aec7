// Faults in accesses to memory and in asynchronous copies.
#include <cstdint>

#include "core/device.cuh"
#include "faults.cuh"

namespace cases {
namespace {

using namespace peft_kernels::cuda;
using cases::kWarp;
using cases::shared_memory;

template <bool kBroken>
__global__ void copy_read_early(Pointers p) {
  auto* s = shared_memory<float>();
  const int i = threadIdx.x;
  if (i < kCount / 4) copy_async_16(s + 4 * i, p.in + 4 * i);
  copy_async_commit();
  if (!kBroken) copy_async_wait<0>();
  __syncthreads();
  p.out[i] = s[i];  // fault: copy_read_early
}

// A wait may leave the last group in flight; a copy without a group is not waited for at all.
template <bool kBroken>
__global__ void copy_of_last_group(Pointers p) {
  auto* s = shared_memory<float>();
  const int i = threadIdx.x;
  copy_async_16(s + 8 * i, p.in + 4 * i);
  copy_async_commit();
  copy_async_16(s + 8 * i + 4, p.in + 4 * i);
  if (!kBroken) copy_async_commit();
  copy_async_wait<kBroken ? 0 : 1>();
  p.out[i] = s[8 * i];
  copy_async_wait<0>();
  p.out[i] = s[8 * i + 4];  // fault: copy_of_last_group
}

// A thread waits only for its own copies.
template <bool kBroken>
__global__ void copy_of_another(Pointers p) {
  auto* s = shared_memory<float>();
  const int i = threadIdx.x;
  copy_async_16(s + 4 * i, p.in + 4 * i);
  copy_async_commit();
  copy_async_wait<0>();
  if (!kBroken) __syncthreads();
  p.out[i] = s[4 * ((i + 32) % kCount)];  // fault: copy_of_another
}

// The copy may read its source at any time until the wait.
template <bool kBroken>
__global__ void copy_source_changed(Pointers p) {
  auto* s = shared_memory<float>();
  const int i = 4 * threadIdx.x;
  copy_async_16(s + i, p.out + i);  // fault: copy_source_changed
  copy_async_commit();
  if (!kBroken) copy_async_wait<0>();
  p.out[i] = 1.0f;
  copy_async_wait<0>();
}

template <bool kBroken>
__global__ void copy_to_global(Pointers p) {
  auto* s = shared_memory<float>();
  const int i = 4 * threadIdx.x;
  copy_async_16(kBroken ? p.out + i : s + i, p.in + i);  // fault: copy_to_global
}

template <bool kBroken>
__global__ void copy_from_shared(Pointers p) {
  auto* s = shared_memory<float>();
  const int i = 4 * threadIdx.x;
  copy_async_16(s + i, kBroken ? s + i : p.in + i);  // fault: copy_from_shared
}

template <bool kBroken>
__global__ void copy_over_read(Pointers p) {
  auto* s = shared_memory<float>();
  const int i = threadIdx.x;
  s[i] = 1.0f;
  __syncthreads();
  p.out[i] = s[i];
  if (!kBroken) __syncthreads();
  if (i < kCount / 4) copy_async_16(s + 4 * i, p.in + 4 * i);
  copy_async_commit();
  copy_async_wait<0>();
}

template <bool kBroken>
__global__ void unaligned_load(Pointers p) {
  const auto* at = p.in + (kBroken ? 1 : 0);
  const auto value = load_once(reinterpret_cast<const Words4*>(at));  // fault: unaligned_load
  p.out[threadIdx.x] = __uint_as_float(value.v[0]);
}

template <bool kBroken>
__global__ void out_of_bounds(Pointers) {
  volatile auto* s = shared_memory<float>();
  s[threadIdx.x + (kBroken ? 1 : 0)] = 1.0f;  // fault: out_of_bounds
}

template <bool kBroken>
__global__ void below_bounds(Pointers p) {
  auto* s = shared_memory<float>();
  const int i = threadIdx.x;
  s[i] = 1.0f;
  __syncthreads();
  const uint32_t address = shared_address(s + i) - (kBroken ? 4 : 0);
  p.out[i] = __uint_as_float(load_shared(address));  // fault: below_bounds
}

template <bool kBroken>
__global__ void read_before_written(Pointers p) {
  auto* s = shared_memory<float>();
  const int i = threadIdx.x;
  if (!kBroken || i != 5) s[i] = 1.0f;
  __syncthreads();
  p.out[i] = s[(i + 1) % kCount];  // fault: read_before_written
}

template <bool kBroken>
__global__ void constant_in_shared(Pointers p) {
  auto* s = shared_memory<float>();
  const int i = threadIdx.x;
  s[i] = 1.0f;
  __syncthreads();
  p.out[i] = __ldg((kBroken ? s : p.in) + i);  // fault: constant_in_shared
}

template <bool kBroken>
__global__ void atomic_in_shared(Pointers p) {
  auto* s = shared_memory<uint32_t>();
  s[threadIdx.x] = 0;
  __syncthreads();
  atomic_add_ordered(kBroken ? s : p.counter, 1);  // fault: atomic_in_shared
}

template <bool kBroken>
__global__ void null_pointer(Pointers p) {
  const int i = threadIdx.x;
  volatile float* to = kBroken && i == 12 ? nullptr : p.out + i;
  *to = 1.0f;  // fault: null_pointer
}

template <bool kBroken>
__global__ void wild_pointer(Pointers p) {
  const auto* at = kBroken ? reinterpret_cast<const float*>(uintptr_t{1} << 44) : p.in;
  p.out[threadIdx.x] = *at;  // fault: wild_pointer
}

template <bool kBroken>
__global__ void global_out_of_bounds(Pointers p) {
  p.out[threadIdx.x + (kBroken ? kElements - kCount + 1 : 0)] = 1.0f;  // fault: global_out_of_bounds
}

template <bool kBroken>
__global__ void constant_that_changes(Pointers p) {
  const int i = threadIdx.x;
  p.out[i] = 1.0f;
  if (!kBroken) return;
  p.out[kCount + i] = __ldg(p.out + i);
}

}  // namespace

const Cases& memory_faults() {
  static const Cases cases = {
      FAULT(copy_read_early, 1),
      FAULT(copy_of_last_group, 1, 32 * kCount),
      FAULT(copy_of_another, 1, 16 * kCount),
      FAULT(copy_source_changed, 1, 16 * kCount),
      FAULT(copy_to_global, 1, 16 * kCount),
      FAULT(copy_from_shared, 1, 16 * kCount),
      FAULT(copy_over_read, 1),
      FAULT(unaligned_load, 1),
      FAULT(out_of_bounds, 1),
      FAULT(below_bounds, 1),
      FAULT(read_before_written, 1),
      FAULT(constant_in_shared, 1),
      FAULT(atomic_in_shared, 1),
      FAULT(null_pointer, 1),
      FAULT(wild_pointer, 1),
      FAULT(global_out_of_bounds, 1),
      FAULT(constant_that_changes, 1),
  };
  return cases;
}

}  // namespace cases
