// `loop` runs the kernels of NF4 GEMMs and of dequantising on the PTX machine, against sums in double:
// without torch. `loop NAME` runs those whose name contains NAME.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "../ptx/cases/cases.cuh"
#include "common/codes.h"
#include "linear/linear.h"
#include "runtime/cudart.h"

namespace peft_kernels::cuda {
namespace {

using cases::Array;

uint16_t to_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
float of_bf16(uint16_t value) {
  const uint32_t bits = uint32_t{value} << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}

class Scratch final : public Context {
 public:
  using Context::Context;
  void* workspace(int64_t bytes) override { return (workspace_ = make<uint8_t>(bytes))->data(); }
  uint32_t* counters(int64_t count) override { return (counters_ = make<uint32_t>(count))->data(); }
  bool has_zeros() const {
    for (const uint32_t count : counters_ ? counters_->values() : std::vector<uint32_t>{}) {
      if (count != 0) return false;
    }
    return true;
  }

 private:
  template <class T>
  static std::unique_ptr<Array<T>> make(int64_t count) {
    return std::make_unique<Array<T>>(static_cast<size_t>(count > 0 ? count : 1));
  }
  std::unique_ptr<Array<uint8_t>> workspace_;
  std::unique_ptr<Array<uint32_t>> counters_;
};

// A random weight [n, k]: NF4 with a scale for 64 values, or E2M1 with a code of a scale for 16.
struct Weight {
  std::mt19937 random{0};
  std::vector<uint8_t> bytes, codes;
  std::vector<float> scales, values;  // values: as the format defines them
  int block_shift;

  Weight(int n, int k, bool has_scale_codes) : bytes(n * k / 2), values(n * k) {
    block_shift = has_scale_codes ? 4 : 6;
    const float* table = kCodeValues[has_scale_codes ? kE2M1Codes : 0].value;
    const int blocks = n * k >> block_shift;
    for (uint8_t& byte : bytes) byte = static_cast<uint8_t>(random());
    if (has_scale_codes) {
      // E4M3, times the scale of the whole weight.
      for (int code = 0; code < kScaleCodes; ++code) {
        const int exponent = code >> 3 & 15, mantissa = code & 7;
        const float value = exponent ? std::ldexp(8.0f + mantissa, exponent - 10) : std::ldexp(mantissa, -9);
        scales.push_back(value * 0.0137f);
      }
      for (int i = 0; i < blocks; ++i) codes.push_back(static_cast<uint8_t>(40 + random() % 24));
    } else {
      for (int i = 0; i < blocks; ++i) scales.push_back(0.01f + 0.001f * static_cast<float>(random() % 64));
      codes.resize(blocks);
    }
    for (size_t i = 0; i < values.size(); ++i) {
      const int block = static_cast<int>(i >> block_shift);
      const int code = i % 2 == 0 ? bytes[i / 2] >> 4 : bytes[i / 2] & 15;
      values[i] = table[code] * scales[has_scale_codes ? codes[block] : block];
    }
  }
};

struct OnDevice {
  Array<uint8_t> bytes, codes;
  Array<float> scales;
  Nf4View view{};

  explicit OnDevice(const Weight& weight) : bytes(weight.bytes), codes(weight.codes), scales(weight.scales) {
    view.packed = bytes.data();
    view.scale_code = codes.data();
    view.block_shift = weight.block_shift;
    if (weight.block_shift == 4) {
      view.scale_values = scales.data();
      view.code_of_one = kE4M3One;
      view.first_code = kE2M1Codes * nf4::kCodes;
    } else {
      view.scale = scales.data();
    }
  }
};

// With tables of pairs of both sizes.
constexpr Card kCards[] = {{80, 4, 163 << 10, 1024}, {86, 4, 99 << 10, 1024}};
int failures = 0;

void report(const std::string& name, const char* shape, double worst, double allowed) {
  const bool is_right = worst <= allowed;  // not if it is NaN
  failures += !is_right;
  std::printf("%-22s %-16s error %.3g, allowed %.3g: %s\n", name.c_str(), shape, worst, allowed,
              is_right ? "right" : "WRONG");
}

// y = x W^T or dx = dy W for m rows, if the plan's kernel has the wanted name.
void gemm(const Card& card, int m, int n, int k, bool is_dx, bool has_scale_codes,
          const std::string& wanted) {
  const int shift = has_scale_codes ? 4 : 6;
  const LinearPlan plan = has_scale_codes
                              ? plan_scale_codes(is_dx, DType::kBF16, m, n, k, shift, card)
                              : plan_linear(is_dx, DType::kBF16, m, n, k, shift, card, Kernels::kMmaSync);
  if (!plan.has_kernel() || std::string(plan.name).find(wanted) == std::string::npos) return;
  Weight weight(n, k, has_scale_codes);
  const OnDevice on_device(weight);
  const int terms = is_dx ? n : k, features = is_dx ? k : n;
  std::vector<uint16_t> x(m * terms);
  std::normal_distribution<float> normal;
  for (uint16_t& value : x) value = to_bf16(normal(weight.random));
  const Array<uint16_t> rows(x), result(std::vector<uint16_t>(m * features, 0x7fff));  // NaN
  LinearParams params{};
  params.x = rows.data();
  params.dtype = DType::kBF16;
  params.weight = on_device.view;
  params.m = m;
  params.n = n;
  params.k = k;
  params.y = result.data();
  Scratch context(card, nullptr);
  plan.start(params, context);
  const std::vector<uint16_t> got = result.values();
  double worst = 0, squares = 0;
  for (int row = 0; row < m; ++row) {
    for (int feature = 0; feature < features; ++feature) {
      double sum = 0;
      for (int i = 0; i < terms; ++i) {
        sum += double{of_bf16(x[row * terms + i])} * weight.values[is_dx ? i * k + feature : feature * k + i];
      }
      const double error = std::abs(of_bf16(got[row * features + feature]) - sum);
      worst = error <= worst ? worst : error;  // NaN stays
      squares += sum * sum;
    }
  }
  char shape[32];
  std::snprintf(shape, sizeof(shape), "%dx%dx%d", m, n, k);
  if (!context.has_zeros()) worst = INFINITY;
  // Eight roundings to bf16, of the result and of weights.
  report(plan.name, shape, worst, std::sqrt(squares / (m * features)) / 16);
}

// To fp32, to the bit.
void dequantize(int n, int k, bool has_scale_codes) {
  const Weight weight(n, k, has_scale_codes);
  const OnDevice on_device(weight);
  const Array<float> out(weight.values.size());
  dequantize_nf4(on_device.view, {0, n, 0, k, k}, out.data(), DType::kF32, k, nullptr);
  cases::check(cudaDeviceSynchronize());
  double worst = 0;
  const std::vector<float> got = out.values();
  for (size_t i = 0; i < got.size(); ++i) worst = std::max<double>(worst, got[i] != weight.values[i]);
  report("dequantize", has_scale_codes ? "scale codes" : "nf4", worst, 0);
}

int run(const std::string& wanted) {
  for (const Card& card : kCards) {
    cudart::set_card(card.compute_capability, card.shared_bytes, card.reserved_bytes);
    for (const int m : {1, 5, 12, 30, 70}) {
      for (const auto& [n, k] : {std::pair{136, 320}, std::pair{264, 64}}) {
        gemm(card, m, n, k, false, true, wanted);
        for (const bool is_dx : {false, true}) gemm(card, m, n, k, is_dx, false, wanted);
      }
    }
  }
  if (std::string("dequantize").find(wanted) != std::string::npos) {
    for (const bool has_scale_codes : {false, true}) dequantize(72, 96, has_scale_codes);
  }
  return failures > 0;
}

}  // namespace
}  // namespace peft_kernels::cuda

int main(int count, char** arguments) {
  try {
    return peft_kernels::cuda::run(count > 1 ? arguments[1] : "");
  } catch (const std::exception& error) {  // a fault of a kernel
    std::printf("%s\n", error.what());
    return 1;
  }
}
