#include "nf4_absmax.h"

#include <algorithm>
#include <cfloat>
#include <cstring>
#include <limits>

#include "../../common/nf4.h"

namespace peft_kernels::cpu {
namespace {

// A value's code is the number of midpoints m with x > m: the nearest map entry, the lower one on a tie. It
// is looked up by the sign, the exponent and six bits of the fraction, which leaves at most one midpoint to
// compare with; a binary search would take eight unpredictable branches.
constexpr int kFractionBits = 6, kFirstExponent = -22, kExponents = 1 - kFirstExponent;
constexpr int kBuckets = (kExponents - 1) * (1 << kFractionBits) + 1;  // up to 1, which closes the last one
constexpr uint32_t kFirstBits = static_cast<uint32_t>(127 + kFirstExponent) << 23, kLastBits = 127u << 23;

struct DynamicCodes {
  float midpoints[nf4::kDynamicCodes];  // the last one is infinity
  uint8_t first[2][kBuckets];           // code of the least value of a bucket, for positive and negative ones
  bool one_midpoint_a_bucket;
};

constexpr DynamicCodes make_dynamic_codes() {
  DynamicCodes out{};
  for (int i = 0; i + 1 < nf4::kDynamicCodes; ++i) {
    out.midpoints[i] = (nf4::kDynamicMap[i] + nf4::kDynamicMap[i + 1]) * 0.5f;
  }
  out.midpoints[nf4::kDynamicCodes - 1] = std::numeric_limits<float>::infinity();
  out.one_midpoint_a_bucket = true;
  float power = 1.0f;
  for (int i = 0; i > kFirstExponent; --i) power *= 0.5f;
  for (int b = 0; b < kBuckets; ++b) {
    const int step = b % (1 << kFractionBits);
    if (b > 0 && step == 0) power *= 2.0f;
    const float low = power * (1.0f + step / 64.0f), high = low + power / 64.0f;
    // Only 0 lies below the first bucket, and nothing above 1 in the last one.
    const float least = b == 0 ? 0.0f : low;
    int below_positive = 0, in_positive = 0, below_negative = 0, in_negative = 0;
    for (int i = 0; i + 1 < nf4::kDynamicCodes; ++i) {
      const float m = out.midpoints[i];
      below_positive += m < least;
      in_positive += m >= least && m < high;
      below_negative += m <= -high;
      in_negative += m > -high && m < -least;
    }
    out.first[0][b] = static_cast<uint8_t>(below_positive);
    out.first[1][b] = static_cast<uint8_t>(below_negative);
    out.one_midpoint_a_bucket &= in_positive <= 1 && in_negative <= 1;
  }
  return out;
}
constexpr DynamicCodes kDynamic = make_dynamic_codes();
static_assert(kDynamic.one_midpoint_a_bucket, "");

uint8_t dynamic_code(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  const uint32_t magnitude = std::clamp(bits & 0x7fffffff, kFirstBits, kLastBits);
  const int code = kDynamic.first[bits >> 31][(magnitude - kFirstBits) >> (23 - kFractionBits)];
  return x == x ? static_cast<uint8_t>(code + (x > kDynamic.midpoints[code])) : 0;
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
