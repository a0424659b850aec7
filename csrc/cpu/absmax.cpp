#include "absmax.h"

#include <algorithm>
#include <cfloat>
#include <cstring>

#include "../common/nf4.h"

namespace peft_kernels::cpu {
namespace {

struct Midpoints {
  float values[nf4::kDynamicCodes - 1];
};

constexpr Midpoints make_midpoints() {
  Midpoints out{};
  for (int i = 0; i + 1 < nf4::kDynamicCodes; ++i) {
    out.values[i] = (nf4::kDynamicMap[i] + nf4::kDynamicMap[i + 1]) * 0.5f;
  }
  return out;
}
constexpr Midpoints kMidpoints = make_midpoints();

// How many midpoints m satisfy x > m, strictly: the nearest map entry, the lower one on a tie.
uint8_t dynamic_code(float x) {
  int code = 0;
  for (int step = nf4::kDynamicCodes / 2; step > 0; step /= 2) {
    if (x > kMidpoints.values[code + step - 1]) code += step;
  }
  return static_cast<uint8_t>(code);
}

uint32_t abs_bits(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits & 0x7fffffff;
}

}  // namespace

void quantize_absmax_groups(const float* absmax, int64_t blocks, float offset, int64_t group_begin,
                            int64_t group_end, uint8_t* q8, float* absmax2) {
  for (int64_t group = group_begin; group < group_end; ++group) {
    const int64_t begin = group * nf4::kAbsmaxBlock;
    const int64_t end = std::min<int64_t>(begin + nf4::kAbsmaxBlock, blocks);
    uint32_t max_bits = 0;
    for (int64_t i = begin; i < end; ++i) max_bits = std::max(max_bits, abs_bits(absmax[i] - offset));
    std::memcpy(absmax2 + group, &max_bits, sizeof(max_bits));
    float inverse = 1.0f / absmax2[group];
    if (inverse > FLT_MAX) inverse = 0.0f;
    for (int64_t i = begin; i < end; ++i) q8[i] = dynamic_code((absmax[i] - offset) * inverse);
  }
}

void unpack_absmax_range(const uint8_t* q8, const float* absmax2, float offset, int64_t begin, int64_t end,
                         float* absmax) {
  for (int64_t i = begin; i < end; ++i) {
    absmax[i] = nf4::kDynamicMap[q8[i]] * absmax2[i >> nf4::kAbsmaxBlockShift] + offset;
  }
}

}  // namespace peft_kernels::cpu
