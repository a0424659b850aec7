// Codes of the dynamic maps, by common/dynamic_search.h. Numbers so close to a midpoint that rounding might
// decide are compared with it.

class MidpointCounter {
 public:
  explicit MidpointCounter(const DynamicSearch& search)
      : border_(search.border),
        segment_(search.segment),
        slope_(search.slope),
        start_(search.start),
        last_(search.last),
        midpoints_(search.midpoints) {}

  // How many midpoints x exceeds; x >= 0, finite.
  VecN count(Vec x) const {
    constexpr int32_t kBias = 127 + DynamicSearch::kFirstExponent;
    VecN binade = ((VecN)x >> 23) - kBias;
    binade &= binade > 0;
    const VecN segment = (VecN)segment_[binade] - (x > border_[binade]);
    const Vec place = x * slope_[segment] + start_[segment], last = last_[segment];
    const Vec code = place < last ? place : last;
    VecN counted = truncate(code);
    // The place of a midpoint is an integer, within 1e-4 for all rounding above.
    constexpr float kNear = 1.0f / 2048;
    if (any_outside(code - to_floats(counted), kNear, 1 - kNear)) {
      counted += counted > 0;
      counted -= x > gather(midpoints_, counted);
      counted -= x > gather(midpoints_, counted);
    }
    return counted;
  }

 private:
  Table32 border_, segment_;
  Table16 slope_, start_, last_;
  const float* midpoints_;
};

// Below zero a tie takes the code farther from it: the midpoint itself has to count, and what is next to it
// does.
inline VecN signed_codes(const MidpointCounter& counter, Vec x) {
  const VecN bits = (VecN)x, negative = bits >> 31;  // -1 or 0
  const VecN counted = counter.count((Vec)((bits & 0x7fffffff) - negative));
  const VecN most = VecN{} + kSignedZero;
  return most + (negative ? -(counted < most ? counted : most) : counted);
}
