// Matrix instructions, against the formulas of the PTX ISA.
#include <cstdint>
#include <cstring>
#include <vector>

#include "cases.cuh"
#include "core/device.cuh"

namespace cases {
namespace {

using namespace peft_kernels::cuda;

// The fragments of a lane.
struct Fragments {
  float c[4];
  uint32_t a[4], b[2];
};
struct Lanes {
  Fragments* lanes;
};

template <class T>
__global__ void multiply(Lanes p) {
  Fragments mine = p.lanes[threadIdx.x];
  if constexpr (std::is_same_v<T, float>) {
    mma_tf32(mine.c, mine.a, mine.b);
  } else {
    mma<T>(mine.c, mine.a, mine.b);
  }
  p.lanes[threadIdx.x] = mine;
}
template <class T>
std::vector<Fragments> multiplied(const std::vector<Fragments>& fragments) {
  const Array<Fragments> lanes(fragments);
  run<Lanes>(multiply<T>, {lanes.data()}, 1, 32, 0);
  return lanes.values();
}

// From a small integer or a power of two, exact in every format.
uint32_t bits_of(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return bits;
}
template <class T>
uint32_t half_of(float x) {
  if (x == 0) return 0;
  const uint32_t bits = bits_of(x), sign = bits >> 16 & 0x8000u;
  if constexpr (std::is_same_v<T, bf16>) return bits >> 16;
  return sign | (((bits & 0x7fffffffu) - (112u << 23)) >> 13);
}
template <class T>
uint32_t pair_of(float low, float high) {
  return half_of<T>(low) | half_of<T>(high) << 16;
}

// The row of a[i] is g for even i and g + 8 for odd ones; its column is 2t + (i / 2) 8, and one more in the
// high half; and so on. Of floats, (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4).
template <class T>
struct Matrices {
  static constexpr int kDepth = std::is_same_v<T, float> ? 8 : 16;
  float a[16][16], b[16][8], c[16][8];

  std::vector<Fragments> fragments() const {
    std::vector<Fragments> all(32);
    for (int lane = 0; lane < 32; ++lane) {
      const int g = lane >> 2, t = lane & 3;
      Fragments& mine = all[static_cast<size_t>(lane)];
      for (int i = 0; i < 4; ++i) mine.c[i] = c[g + i / 2 * 8][2 * t + i % 2];
      for (int i = 0; i < 4; ++i) {
        const float* row = a[g + i % 2 * 8];
        if constexpr (kDepth == 8) {
          mine.a[i] = bits_of(row[t + i / 2 * 4]);
        } else {
          mine.a[i] = pair_of<T>(row[2 * t + i / 2 * 8], row[2 * t + i / 2 * 8 + 1]);
        }
      }
      for (int i = 0; i < 2; ++i) {
        if constexpr (kDepth == 8) {
          mine.b[i] = bits_of(b[t + 4 * i][g]);
        } else {
          mine.b[i] = pair_of<T>(b[2 * t + 8 * i][g], b[2 * t + 8 * i + 1][g]);
        }
      }
    }
    return all;
  }
};

// Small integers, so that all sums are exact.
template <class T>
void layout() {
  Matrices<T> m;
  uint64_t state = 1;
  const auto fill = [&](auto& matrix) {
    for (auto& row : matrix) {
      for (float& x : row) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        x = static_cast<float>(static_cast<int>(state >> 33) % 17 - 8);
      }
    }
  };
  fill(m.a);
  fill(m.b);
  fill(m.c);
  const auto out = multiplied<T>(m.fragments());
  for (int i = 0; i < 16; ++i) {
    for (int j = 0; j < 8; ++j) {
      float sum = m.c[i][j];
      for (int k = 0; k < Matrices<T>::kDepth; ++k) sum += m.a[i][k] * m.b[k][j];
      const Fragments& owner = out[static_cast<size_t>(4 * (i % 8) + j / 2)];
      expect(owner.c[2 * (i / 8) + j % 2] == sum, "element of a matrix product");
    }
  }
}

// tf32 ignores the lower 13 bits.
void tf32_is_truncated() {
  Matrices<float> m{};
  m.a[0][0] = 1.0f + 0x1p-10f + 0x1p-11f;
  m.b[0][0] = 1.0f;
  const auto out = multiplied<float>(m.fragments());
  expect(out[0].c[0] == 1.0f + 0x1p-10f, "19 bits of a float");
}

// 1 plus three quarters of its last place: rounding to nearest goes up, but tensor cores truncate.
template <class T>
void is_truncated() {
  Matrices<T> m{};
  m.c[0][0] = 1.0f;
  m.a[0][0] = 0x1.8p-12f;
  m.b[0][0] = 0x1p-12f;
  expect(multiplied<T>(m.fragments())[0].c[0] == 1.0f, "a truncated sum");
}

}  // namespace

const Cases& matrix_cases() {
  static const Cases cases = {
      {"matrix_bf16", layout<bf16>},
      {"matrix_fp16", layout<fp16>},
      {"matrix_tf32", layout<float>},
      {"tf32_is_truncated", tf32_is_truncated},
      {"sum_is_truncated_bf16", is_truncated<bf16>},
      {"sum_is_truncated_fp16", is_truncated<fp16>},
  };
  return cases;
}

}  // namespace cases
