// Memory, bank conflicts and the order of blocks, for test_emulator.py.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "body.h"
#include "cases.h"

namespace peft_kernels::cuda {
namespace {

// ---- Loads, stores and copies --------------------------------------------------------------------------

template <class T>
void move_body(const T* in, T* out) {
  const int i = thread_index();
  auto* s = shared_memory<T>();
  store(s + i, load(in + i));
  sync_threads();
  store(out + i, load(s + (i ^ 1)));
  store(out + kWarp + i, load_constant(in + i));
  if constexpr (sizeof(T) >= 4) store(out + 2 * kWarp + i, load_once(in + i));
  if constexpr (sizeof(T) == 4) {
    const uint32_t word = load_shared(shared_address(s + i));
    store(out + 3 * kWarp + i, bit_cast<T>(word));
  }
}
template <class T>
void moves() {
  std::vector<T> in(kWarp), out(4 * kWarp);
  constexpr size_t kBytes = kWarp * sizeof(T);
  for (size_t i = 0; i < kBytes; ++i)
    reinterpret_cast<uint8_t*>(in.data())[i] = static_cast<uint8_t>(i * 7 + i / 251);
  run_kernel<T, T, move_body<T>>(in, out);
  for (size_t i = 0; i < kWarp; ++i) {
    expect(std::memcmp(&out[i], &in[i ^ 1], sizeof(T)) == 0, "a value to pass through shared memory");
  }
  const auto is_copy = [&](int part) { return std::memcmp(&out[part * kWarp], in.data(), kBytes) == 0; };
  expect(is_copy(1), "load_constant to load");
  expect(sizeof(T) < 4 || is_copy(2), "load_once to load");
  expect(sizeof(T) != 4 || is_copy(3), "load_shared to load");
}

void start_body(const float*, float* out) {
  auto* s = shared_memory<float>();
  store(out + lane_index(), load(s + lane_index()));
  if (lane_index() == 0) {
    store(reinterpret_cast<uint32_t*>(out) + kWarp, shared_address(s));
    store(reinterpret_cast<uint32_t*>(out) + kWarp + 1,
          static_cast<uint32_t>(reinterpret_cast<uintptr_t>(s) % 1024));
  }
}
void shared_start() {
  std::vector<float> in(1), out(kWarp + 2);
  run_kernel<float, float, start_body>(in, out);
  for (int i = 0; i < kWarp; ++i)
    expect(std::isnan(out[static_cast<size_t>(i)]), "shared memory to start as NaN");
  expect(bit_cast<uint32_t>(out[kWarp]) == 1024, "shared addresses to start at 1024");
  expect(bit_cast<uint32_t>(out[kWarp + 1]) == 0, "shared memory to be aligned");
}

void copy_body(const uint32_t* in, uint32_t* out) {
  auto* s = shared_memory<uint32_t>();
  const int i = thread_index();
  copy_async_16(s + 4 * i, i % 3 == 0 ? nullptr : in + 4 * i, i % 3 != 0);
  copy_async_commit();
  copy_async_wait<0>();
  sync_threads();
  store(reinterpret_cast<Words4*>(out) + i, load(reinterpret_cast<const Words4*>(s) + 31 - i));
}
void copies() {
  std::vector<uint32_t> in(4 * kWarp), out(4 * kWarp);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<uint32_t>(i + 1);
  run_kernel<uint32_t, uint32_t, copy_body>(in, out);
  for (size_t i = 0; i < out.size(); ++i) {
    const size_t from = 4 * (31 - i / 4) + i % 4;
    expect(out[i] == (from / 4 % 3 == 0 ? 0 : from + 1), "a copy, or zeros");
  }
}

// ---- Bank conflicts ------------------------------------------------------------------------------------

// Runs the kernel, which accesses shared memory at one line.
template <void (*kBody)(const float*, float*)>
void expect_banks(int accesses, int wavefronts, int conflicts) {
  std::vector<float> in(1), out(1);
  simt::reset_bank_counts();
  run_kernel<float, float, kBody>(in, out, 1, 32768);
  const auto counts = simt::bank_counts();
  expect(counts.size() == 1 && counts.begin()->first.find("memory_cases.cpp:") == 0, "accesses at one line");
  const simt::BankCount& count = counts.begin()->second;
  const std::string found = std::to_string(count.accesses) + " accesses, " +
                            std::to_string(count.wavefronts) + " wavefronts, " +
                            std::to_string(count.conflicts) + " conflicts";
  const bool same =
      count.accesses == accesses && count.wavefronts == wavefronts && count.conflicts == conflicts;
  expect(same, "other counts than " + found + " at " + counts.begin()->first);
  simt::reset_bank_counts();
  expect(simt::bank_counts().empty(), "no counts after a reset");
}

template <class T, int kStride>  // bytes from lane to lane
void strided(const float*, float*) {
  store(reinterpret_cast<T*>(shared_memory<char>() + kStride * lane_index()), T{});
}
void one_word_for_all(const float*, float*) { load(shared_memory<float>() + 7); }
void half_a_warp(const float*, float*) {
  if (lane_index() % 2 == 0) store(shared_memory<float>() + 16 * lane_index(), 1.0f);
}
// Each lane as often as its index says; the n-th of the lanes belong together.
void unequal_loops(const float*, float*) {
  auto* s = shared_memory<float>();
  for (int i = 0; i <= lane_index() / 8; ++i) store(s + 64 * lane_index() + i, 1.0f);
}
template <int kStride>
void copied_rows(const float* in, float*) {
  copy_async_16(shared_memory<char>() + kStride * lane_index(), in, false);
}
void banks() {
  expect_banks<strided<float, 4>>(1, 1, 0);
  expect_banks<strided<float, 8>>(1, 2, 1);
  expect_banks<strided<float, 128>>(1, 32, 31);
  expect_banks<strided<float, 132>>(1, 1, 0);
  expect_banks<strided<uint8_t, 1>>(1, 1, 0);
  expect_banks<strided<bf16, 2>>(1, 1, 0);
  expect_banks<strided<bf16, 64>>(1, 16, 15);
  expect_banks<strided<Words2, 8>>(1, 2, 0);
  expect_banks<strided<Words2, 16>>(1, 4, 2);
  expect_banks<strided<Words4, 16>>(1, 4, 0);
  expect_banks<strided<Words4, 32>>(1, 8, 4);
  expect_banks<strided<Words4, 144>>(1, 4, 0);
  expect_banks<one_word_for_all>(1, 1, 0);
  expect_banks<half_a_warp>(1, 16, 15);
  expect_banks<unequal_loops>(4, 32 + 24 + 16 + 8, 31 + 23 + 15 + 7);
  expect_banks<copied_rows<80>>(1, 4, 0);
  expect_banks<copied_rows<64>>(1, 16, 12);
}

// ---- Blocks --------------------------------------------------------------------------------------------

// What ran, in order: three times for each thread. Nothing but a ballot makes it wait.
std::vector<uint32_t> ran;
void order_body(const float*, float*) {
  for (int i = 0; i < 3; ++i) {
    ran.push_back(static_cast<uint32_t>(block_index() * 64 + thread_index()));
    ballot(true);
  }
}
std::vector<uint32_t> order(uint64_t seed) {
  std::vector<float> in(1), out(1);
  ran.clear();
  simt::set_seed(seed);
  run_kernel<float, float, order_body, 64>(in, out, 7);
  std::vector<int> turns(7 * 64);
  for (const uint32_t thread : ran) ++turns[thread];
  for (const int count : turns) expect(count == 3, "each thread to run");
  return ran;
}
// In the order of `ran`, without repeats: threads divided by `size`.
std::vector<uint32_t> groups(const std::vector<uint32_t>& threads, uint32_t size) {
  std::vector<uint32_t> result;
  for (const uint32_t thread : threads) {
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
  const auto blocks = groups(first, 64);
  std::vector<uint32_t> starts;
  for (const uint32_t block : blocks) {
    if (std::find(starts.begin(), starts.end(), block) == starts.end()) starts.push_back(block);
  }
  expect(!std::is_sorted(starts.begin(), starts.end()), "blocks to start in any order");
  expect(!std::is_sorted(first.begin(), first.begin() + 16), "lanes to run in any order");
}

struct Wide {
  static constexpr int kThreads = 1024, kBlocksPerSm = 1;
  struct Params {
    uint32_t* sum;
  };
  static DEVICE void run(const Params& p) { atomic_add_ordered(p.sum, static_cast<uint32_t>(grid_size())); }
};
void launches() {
  uint32_t sum = 0;
  simt::set_shared_limit(simt::kMaxSharedBytes);
  launch<Wide>({&sum}, 3, nullptr, simt::kMaxSharedBytes);
  expect(sum == 3 * 1024 * 3, "all threads to run");
  launch<Wide>({&sum}, 0, nullptr);
  expect(sum == 3 * 1024 * 3, "no blocks to do nothing");
  simt::set_shared_limit(99 << 10);
  std::string told;
  try {
    launch<Wide>({&sum}, 1, nullptr, (99 << 10) + 1);
  } catch (const std::runtime_error& error) {
    told = error.what();
  }
  expect(told == "a kernel did not start: invalid argument", "too much memory to fail");
}

}  // namespace

const Cases& memory_cases() {
  static const Cases cases = {
      {"moves_1", moves<uint8_t>},
      {"moves_2", moves<bf16>},
      {"moves_4", moves<float>},
      {"moves_8", moves<Words2>},
      {"moves_16", moves<Vec<fp16, 8>>},
      {"shared_start", shared_start},
      {"copies", copies},
      {"banks", banks},
      {"orders", orders},
      {"launches", launches},
  };
  return cases;
}

}  // namespace peft_kernels::cuda
