// Cases that only a card can fail: several blocks or warps in parallel, launches, shared memory.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "card_cases.h"
#include "core/device.cuh"
#include "core/launch.cuh"

namespace cases {
namespace {

using namespace peft_kernels::cuda;
using cases::shared_memory;

constexpr int kThreads = 256;

// ---- Between blocks -----------------------------------------------------------------------------------

struct Tickets {
  float* parts;  // [block, thread]
  float* sums;   // [thread]
  uint32_t *counter, *tickets;
};
// The last block to arrive adds up what all blocks wrote: with plain loads, from other multiprocessors.
__global__ void sum_in_the_last(Tickets p) {
  const int i = threadIdx.x, blocks = gridDim.x;
  auto* ticket = shared_memory<uint32_t>();
  store(p.parts + kThreads * blockIdx.x + i, static_cast<float>(blockIdx.x % 16 + i));
  __syncthreads();
  if (i == 0) {
    *ticket = atomic_add_ordered(p.counter, 1);
    p.tickets[blockIdx.x] = *ticket;
  }
  __syncthreads();
  if (*ticket != static_cast<uint32_t>(blocks - 1)) return;
  float sum = 0;
  for (int block = 0; block < blocks; ++block) sum += load(p.parts + kThreads * block + i);
  p.sums[i] = sum;
}
void tickets() {
  constexpr int kBlocks = 1024, kRepeats = 50;
  for (int repeat = 0; repeat < kRepeats; ++repeat) {
    const Array<float> parts(size_t{kBlocks} * kThreads), sums(kThreads);
    const Array<uint32_t> counter(1), taken(kBlocks);
    run<Tickets>(sum_in_the_last, {parts.data(), sums.data(), counter.data(), taken.data()}, kBlocks,
                 kThreads, 16);
    auto order = taken.values();
    std::sort(order.begin(), order.end());
    for (uint32_t i = 0; i < kBlocks; ++i) expect(order[i] == i, "a ticket for each block");
    const auto found = sums.values();
    for (int i = 0; i < kThreads; ++i) {
      const float sum = kBlocks / 16 * 120 + static_cast<float>(kBlocks * i);
      expect(found[static_cast<size_t>(i)] == sum, "the last block to see what all others wrote");
    }
  }
}

// ---- Copies in flight ---------------------------------------------------------------------------------

struct Stream16 {
  const uint32_t* in;  // [step, thread, 4]
  uint32_t* out;       // [thread]
  int steps;
};
// Steps pass through a ring of stages; some copies are in flight while another thread reads an earlier stage.
template <int kStages>
__global__ void through_a_ring(Stream16 p) {
  auto* ring = shared_memory<Words4>();  // [stage, thread]
  const int i = threadIdx.x;
  const auto begin = [&](int step) {
    if (step < p.steps) {
      copy_async_16(ring + step % kStages * kThreads + i, p.in + 4 * (step * kThreads + i), step % 7 != 3);
    }
    copy_async_commit();
  };
  for (int step = 0; step < kStages - 1; ++step) begin(step);
  uint32_t sum = 0;
  for (int step = 0; step < p.steps; ++step) {
    copy_async_wait<kStages - 2>();
    __syncthreads();
    begin(step + kStages - 1);
    const Words4 words = load(ring + step % kStages * kThreads + (kThreads - 1 - i));
    for (int j = 0; j < 4; ++j) sum = 3 * sum + words.v[j];
  }
  copy_async_wait<0>();
  p.out[i] = sum;
}
template <int kStages>
void ring() {
  constexpr int kSteps = 100;
  std::vector<uint32_t> values(size_t{4} * kSteps * kThreads);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<uint32_t>(i * 2654435761u);
  const Array<uint32_t> in(values), result(kThreads);
  run<Stream16>(through_a_ring<kStages>, {in.data(), result.data(), kSteps}, 1, kThreads,
                16 * kStages * kThreads);
  const auto out = result.values();
  for (int i = 0; i < kThreads; ++i) {
    uint32_t sum = 0;
    for (int step = 0; step < kSteps; ++step) {
      for (int j = 0; j < 4; ++j) {
        const auto at = static_cast<size_t>(4 * (step * kThreads + kThreads - 1 - i) + j);
        sum = 3 * sum + (step % 7 == 3 ? 0 : values[at]);
      }
    }
    expect(out[static_cast<size_t>(i)] == sum, "copies in the order of their groups");
  }
}

// ---- Warps of a block ---------------------------------------------------------------------------------

struct Words {
  const uint32_t* in;
  uint32_t* out;
};
__global__ void in_each_warp(Words p) {
  const int i = threadIdx.x;
  p.out[i] = static_cast<uint32_t>(warp_index());
  p.out[kThreads + i] = __shfl_sync(peft_kernels::cuda::kAllLanes, p.in[i], 31 - i % 32);
  p.out[2 * kThreads + i] = __ballot_sync(peft_kernels::cuda::kAllLanes, (p.in[i] >> (i / 32) & 1) != 0);
}
void warps() {
  std::vector<uint32_t> values(kThreads);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<uint32_t>((i + 1) * 2654435761u);
  const Array<uint32_t> in(values), result(3 * kThreads);
  run<Words>(in_each_warp, {in.data(), result.data()}, 1, kThreads, 0);
  const auto out = result.values();
  for (size_t i = 0; i < kThreads; ++i) {
    const size_t warp = i / 32;
    uint32_t votes = 0;
    for (size_t lane = 0; lane < 32; ++lane) votes |= (values[32 * warp + lane] >> warp & 1) << lane;
    expect(out[i] == warp, "warp_index of each warp");
    expect(out[kThreads + i] == values[32 * warp + 31 - i % 32], "shuffle within the warp");
    expect(out[2 * kThreads + i] == votes, "ballot of the warp");
  }
}

// ---- Halves of a word ---------------------------------------------------------------------------------

template <class T>
__global__ void halves_of(Words p) {
  const int i = kThreads * blockIdx.x + threadIdx.x;
  const uint32_t word = p.in[i];
  p.out[2 * i] = bit_cast<uint32_t>(from_float<float>(low_half<T>(word)));
  p.out[2 * i + 1] = bit_cast<uint32_t>(high_half<T>(word));
}
// The bits of a float from those of a normal 16-bit one; for fp16 the exponent changes.
template <class T>
uint32_t widened(uint32_t half) {
  if constexpr (std::is_same_v<T, bf16>) return half << 16;
  return (half & 0x8000u) << 16 | (((half & 0x7fffu) << 13) + (112u << 23));
}
template <class T>
void halves() {
  constexpr uint32_t kExponent = std::is_same_v<T, bf16> ? 0x7f80u : 0x7c00u;
  std::vector<uint32_t> words(0x10000);
  for (uint32_t i = 0; i < words.size(); ++i) words[i] = i | (0xffffu - i) << 16;
  const Array<uint32_t> in(words), result(2 * words.size());
  run<Words>(halves_of<T>, {in.data(), result.data()}, static_cast<int>(words.size()) / kThreads, kThreads,
             0);
  const auto out = result.values();
  for (uint32_t i = 0; i < words.size(); ++i) {
    for (const uint32_t half : {i, 0xffffu - i}) {
      const uint32_t exponent = half & kExponent;
      if (exponent == 0 || exponent == kExponent) continue;
      expect(out[2 * i + (half == i ? 0 : 1)] == widened<T>(half), "half of the word " + std::to_string(i));
    }
  }
}

// ---- Launches through launch.cuh ----------------------------------------------------------------------

struct Reverse {
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerSm = 1;
  struct Params {
    const uint32_t* in;
    uint32_t* out;
    int count;
  };
  static DEVICE void run(const Params& p) {
    auto* s = shared_memory<uint32_t>();
    const int first = static_cast<int>(blockIdx.x) * p.count;
    for (int i = threadIdx.x; i < p.count; i += kThreads) store(s + i, load_constant(p.in + first + i));
    __syncthreads();
    for (int i = threadIdx.x; i < p.count; i += kThreads) store(p.out + first + i, load(s + p.count - 1 - i));
  }
};
void launched() {
  constexpr int kBlocks = 300, kCount = 24 << 10;  // 96 KB per block: needs the opt-in
  std::vector<uint32_t> values(size_t{kBlocks} * kCount);
  for (size_t i = 0; i < values.size(); ++i) values[i] = static_cast<uint32_t>(i);
  const Array<uint32_t> in(values), result(values.size());
  launch<Reverse>({in.data(), result.data(), kCount}, kBlocks, nullptr, 4 * kCount);
  launch<Reverse>({in.data(), nullptr, kCount}, 0, nullptr);
  check(cudaDeviceSynchronize());
  const auto out = result.values();
  for (size_t i = 0; i < out.size(); ++i) {
    const size_t block = i / kCount;
    expect(out[i] == (2 * block + 1) * kCount - 1 - i, "each block to reverse its part");
  }
}

// ---- Where a block's shared memory starts -------------------------------------------------------------

__global__ void store_start(uint32_t* starts) {
  if (threadIdx.x == 0) starts[blockIdx.x] = shared_address(shared_memory<uint8_t>());
}
// Plans leave exactly this much space before it.
void reserved() {
  constexpr int kBlocks = 512;
  const Array<uint32_t> result(kBlocks);
  int reported = 0;
  check(cudaDeviceGetAttribute(&reported, cudaDevAttrReservedSharedMemoryPerBlock, 0));
  for (const int bytes : {16, 16 << 10, 48 << 10}) {
    run<uint32_t*>(store_start, result.data(), kBlocks, kThreads, bytes);
    for (const uint32_t start : result.values()) {
      expect(start <= static_cast<uint32_t>(reported), "shared memory to start within the reserved " +
                                                           std::to_string(reported) + " bytes, not at " +
                                                           std::to_string(start));
    }
  }
}

}  // namespace

const Cases& card_cases() {
  static const Cases cases = {
      {"tickets", tickets},   {"ring_2", ring<2>},           {"ring_4", ring<4>},
      {"warps", warps},       {"halves_bf16", halves<bf16>}, {"halves_fp16", halves<fp16>},
      {"launched", launched}, {"reserved", reserved},
  };
  return cases;
}

}  // namespace cases
