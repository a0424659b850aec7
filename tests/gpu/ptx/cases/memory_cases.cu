// Memory instructions, and return codes of the runtime.
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "cases.cuh"
#include "core/device.cuh"

namespace cases {
namespace {

using namespace peft_kernels::cuda;
using cases::shared_memory;

constexpr int kLanes = 32;

template <class T>
struct Move {
  const T* in;
  T* out;
};

template <class T>
__global__ void move(Move<T> p) {
  const int i = threadIdx.x;
  auto* s = shared_memory<T>();
  store(s + i, load(p.in + i));
  __syncthreads();
  store(p.out + i, load(s + (i ^ 1)));
  store(p.out + kLanes + i, load_constant(p.in + i));
  if constexpr (sizeof(T) >= 4) store(p.out + 2 * kLanes + i, load_once(p.in + i));
  if constexpr (sizeof(T) == 4) {
    const uint32_t word = load_shared(shared_address(s + i));
    store(p.out + 3 * kLanes + i, bit_cast<T>(word));
  }
}
template <class T>
void moves() {
  std::vector<T> values(kLanes);
  constexpr size_t kBytes = kLanes * sizeof(T);
  for (size_t i = 0; i < kBytes; ++i) {
    reinterpret_cast<uint8_t*>(values.data())[i] = static_cast<uint8_t>(i * 7 + i / 251);
  }
  const Array<T> in(values), result(4 * kLanes);
  run<Move<T>>(move<T>, {in.data(), result.data()}, 1, kLanes, kBytes);
  const auto out = result.values();
  for (size_t i = 0; i < kLanes; ++i) {
    expect(std::memcmp(&out[i], &values[i ^ 1], sizeof(T)) == 0, "a value to pass through shared memory");
  }
  const auto is_copy = [&](size_t part) {
    return std::memcmp(&out[part * kLanes], values.data(), kBytes) == 0;
  };
  expect(is_copy(1), "load_constant to load");
  expect(sizeof(T) < 4 || is_copy(2), "load_once to load");
  expect(sizeof(T) != 4 || is_copy(3), "load_shared to load");
}

__global__ void copy(Move<uint32_t> p) {
  auto* s = shared_memory<uint32_t>();
  const int i = threadIdx.x;
  copy_async_16(s + 4 * i, i % 3 == 0 ? nullptr : p.in + 4 * i, i % 3 != 0);
  copy_async_commit();
  copy_async_wait<0>();
  __syncthreads();
  store(reinterpret_cast<Words4*>(p.out) + i, load(reinterpret_cast<const Words4*>(s) + 31 - i));
}
void copies() {
  std::vector<uint32_t> values(4 * kLanes);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<uint32_t>(i + 1);
  const Array<uint32_t> in(values), result(4 * kLanes);
  run<Move<uint32_t>>(copy, {in.data(), result.data()}, 1, kLanes, 16 * kLanes);
  const auto out = result.values();
  for (size_t i = 0; i < out.size(); ++i) {
    const size_t from = 4 * (31 - i / 4) + i % 4;
    expect(out[i] == (from / 4 % 3 == 0 ? 0 : from + 1), "a copy, or zeros");
  }
}

// A constant table in the kernel's image.
__constant__ const uint32_t kTable[] = {3, 1, 4, 1, 5, 9, 2, 6};
__global__ void look_up(Move<uint32_t> p) { p.out[threadIdx.x] = kTable[p.in[threadIdx.x]]; }
void tables() {
  const std::vector<uint32_t> places = {7, 6, 5, 4, 3, 2, 1, 0};
  const Array<uint32_t> in(places), out(8);
  run<Move<uint32_t>>(look_up, {in.data(), out.data()}, 1, 8, 0);
  expect(out.values() == std::vector<uint32_t>({6, 2, 9, 5, 1, 4, 1, 3}), "a table of constants");
}

// ---- Launches -----------------------------------------------------------------------------------------

struct Sum {
  unsigned* sum;
};
__global__ void __launch_bounds__(1024) add_blocks(Sum p) { atomicAdd(p.sum, gridDim.x); }
__global__ void __launch_bounds__(64) add_few(Sum p) { atomicAdd(p.sum, 1); }

template <class Kernel>
cudaError_t start(Kernel kernel, Sum sum, unsigned blocks, unsigned threads, size_t shared_bytes) {
  void* arguments[] = {&sum};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(blocks), dim3(threads), arguments,
                          shared_bytes, nullptr);
}
void launches() {
  const Array<unsigned> counter(1);
  const Sum sum{counter.data()};
  const auto* stub = reinterpret_cast<const void*>(add_blocks);
  const auto allow = [&](int bytes) {
    return cudaFuncSetAttribute(stub, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  };
  const auto refused = [](cudaError_t error, cudaError_t wanted, const std::string& what) {
    expect(error == wanted, what + " to be rejected, not: " + cudaGetErrorString(error));
    expect(cudaGetLastError() == wanted, what + " to be remembered");
    expect(cudaGetLastError() == cudaSuccess, what + " to be cleared by cudaGetLastError");
  };
  check(start(add_blocks, sum, 3, 1024, 48 << 10));
  check(cudaDeviceSynchronize());
  expect(counter.values()[0] == 3 * 1024 * 3, "all threads to run");
  refused(start(add_blocks, sum, 0, 32, 0), cudaErrorInvalidConfiguration, "no blocks");
  refused(start(add_blocks, sum, 0x80000000u, 32, 0), cudaErrorInvalidConfiguration, "too many blocks");
  refused(start(add_blocks, sum, 1, 1025, 0), cudaErrorInvalidConfiguration, "too many threads");
  refused(start(add_few, sum, 1, 96, 0), cudaErrorInvalidValue, "more threads than the launch bounds");
  refused(start(add_blocks, sum, 1, 32, (48 << 10) + 1), cudaErrorInvalidValue,
          "shared memory without opt-in");
  check(allow(96 << 10));
  check(start(add_blocks, sum, 1, 32, 96 << 10));
  refused(start(add_blocks, sum, 1, 32, (96 << 10) + 1), cudaErrorInvalidValue, "more than the opt-in");
  refused(allow(228 << 10), cudaErrorInvalidValue, "more than a card has");
  check(cudaDeviceSynchronize());
  expect(counter.values()[0] == 3 * 1024 * 3 + 32, "no rejected launch to run");
}

}  // namespace

const Cases& memory_cases() {
  static const Cases cases = {
      {"moves_1", moves<uint8_t>},
      {"moves_2", moves<bf16>},
      {"moves_4", moves<float>},
      {"moves_8", moves<Words2>},
      {"moves_16", moves<Vec<fp16, 8>>},
      {"copies", copies},
      {"tables", tables},
      {"launches", launches},
  };
  return cases;
}

}  // namespace cases
