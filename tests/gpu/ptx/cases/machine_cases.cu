// Cases that run on the machine alone: bank conflicts, the order of execution, simulated errors.
#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "../runtime/cudart.h"
#include "cases.cuh"
#include "core/device.cuh"

namespace cases {
namespace {

using namespace peft_kernels::cuda;
using cases::shared_memory;
namespace cudart = peft_kernels::cudart;

// ---- Bank conflicts -----------------------------------------------------------------------------------

struct Input {
  const float* in;
};

// Runs a kernel that accesses shared memory at one line.
void expect_banks(void (*kernel)(Input), int accesses, int wavefronts, int conflicts) {
  const Array<float> in(1);
  ptx::reset_bank_counts();
  run<Input>(kernel, {in.data()}, 1, 32, 32768);
  const auto counts = ptx::bank_counts();
  expect(counts.size() == 1 && counts.begin()->first.find("machine_cases.cu:") == 0, "accesses at one line");
  const ptx::BankCount& count = counts.begin()->second;
  const std::string found = std::to_string(count.accesses) + " accesses, " +
                            std::to_string(count.wavefronts) + " wavefronts, " +
                            std::to_string(count.conflicts) + " conflicts";
  const bool same =
      count.accesses == accesses && count.wavefronts == wavefronts && count.conflicts == conflicts;
  expect(same, "other counts than " + found + " at " + counts.begin()->first);
  ptx::reset_bank_counts();
  expect(ptx::bank_counts().empty(), "no counts after a reset");
}

template <class T, int kStride>  // bytes from lane to lane
__global__ void strided(Input) {
  store(reinterpret_cast<T*>(shared_memory<char>() + kStride * threadIdx.x), T{});
}
__global__ void one_word_for_all(Input) {
  auto* s = shared_memory<float>();
  // clang-format off
  if (threadIdx.x == 7) store(s, 1.0f); __syncthreads(); load_shared(shared_address(s));
  // clang-format on
}
__global__ void half_a_warp(Input) {
  if (threadIdx.x % 2 == 0) store(shared_memory<float>() + 16 * threadIdx.x, 1.0f);
}
// Each lane loops as often as its index says; the n-th iterations of the lanes belong together.
__global__ void unequal_loops(Input) {
  auto* s = shared_memory<float>();
#pragma unroll 1
  for (int i = 0; i <= threadIdx.x / 8; ++i) store(s + 64 * threadIdx.x + i, 1.0f);
}
template <int kStride>
__global__ void copied_rows(Input p) {
  copy_async_16(shared_memory<char>() + kStride * threadIdx.x, p.in, false);
}
void banks() {
  expect_banks(strided<float, 4>, 1, 1, 0);
  expect_banks(strided<float, 8>, 1, 2, 1);
  expect_banks(strided<float, 128>, 1, 32, 31);
  expect_banks(strided<float, 132>, 1, 1, 0);
  expect_banks(strided<uint8_t, 1>, 1, 1, 0);
  expect_banks(strided<bf16, 2>, 1, 1, 0);
  expect_banks(strided<bf16, 64>, 1, 16, 15);
  expect_banks(strided<Words2, 8>, 1, 2, 0);
  expect_banks(strided<Words2, 16>, 1, 4, 2);
  expect_banks(strided<Words4, 16>, 1, 4, 0);
  expect_banks(strided<Words4, 32>, 1, 8, 4);
  expect_banks(strided<Words4, 144>, 1, 4, 0);
  expect_banks(one_word_for_all, 2, 2, 0);
  expect_banks(half_a_warp, 1, 16, 15);
  expect_banks(unequal_loops, 4, 32 + 24 + 16 + 8, 31 + 23 + 15 + 7);
  expect_banks(copied_rows<80>, 1, 4, 0);
  expect_banks(copied_rows<64>, 1, 16, 12);
}

// ---- Order --------------------------------------------------------------------------------------------

struct Turns {
  unsigned* count;
  unsigned* ran;
};
// The order of execution: three entries per thread.
__global__ void take_turns(Turns p) {
#pragma unroll 1
  for (int i = 0; i < 3; ++i) {
    p.ran[atomicAdd(p.count, 1)] = blockIdx.x * 64 + threadIdx.x;
    __syncwarp();
  }
}
std::vector<unsigned> order(uint32_t seed) {
  const Array<unsigned> count(1), ran(3 * 7 * 64);
  const uint32_t before = ptx::options().seed;
  ptx::options().seed = seed;
  run<Turns>(take_turns, {count.data(), ran.data()}, 7, 64, 0);
  ptx::options().seed = before;
  std::vector<int> turns(7 * 64);
  for (const unsigned thread : ran.values()) ++turns[thread];
  for (const int times : turns) expect(times == 3, "each thread to run");
  return ran.values();
}
// In the order of `ran`, without repeats: threads divided by `size`.
std::vector<unsigned> groups(const std::vector<unsigned>& threads, unsigned size) {
  std::vector<unsigned> result;
  for (const unsigned thread : threads) {
    if (result.empty() || result.back() != thread / size) result.push_back(thread / size);
  }
  return result;
}
void orders() {
  const auto first = order(3);
  expect(order(3) == first, "a seed to give the same order again");
  expect(order(4) != first, "another seed to give another order");
  expect(groups(first, 32).size() > 14, "warps to take turns");
  expect(groups(first, 64).size() > 7, "blocks to take turns");
  std::vector<unsigned> starts;
  for (const unsigned block : groups(first, 64)) {
    if (std::find(starts.begin(), starts.end(), block) == starts.end()) starts.push_back(block);
  }
  expect(!std::is_sorted(starts.begin(), starts.end()), "blocks to start in any order");
}

// ---- The runtime --------------------------------------------------------------------------------------

__global__ void nothing(Input) {}
void sticky_errors() {
  const auto start = [](void (*kernel)(Input)) {
    Input input{nullptr};
    void* arguments[] = {&input};
    return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(1), dim3(32), arguments, 0, nullptr);
  };
  cudart::set_sticky_error(cudaErrorIllegalAddress);
  const bool stays = start(nothing) == cudaErrorIllegalAddress &&
                     cudaGetLastError() == cudaErrorIllegalAddress &&
                     cudaGetLastError() == cudaErrorIllegalAddress;
  cudart::set_sticky_error(cudaSuccess);
  expect(stays, "a sticky error to stay");
  check(start(nothing));
  expect(cudaGetLastError() == cudaSuccess, "it to be cleared");
}

}  // namespace

const Cases& machine_cases() {
  static const Cases cases = {
      {"banks", banks},
      {"orders", orders},
      {"sticky_errors", sticky_errors},
  };
  return cases;
}

}  // namespace cases
