// Dropout of the weights of attention: the mask is drawn again for each block, forward and backward.

#include "attention_operands.inl"

struct AttentionDropout {
  const AttentionParams& p;
  uint32_t* words;  // [kStrip keys][kStrip lanes], or null without dropout

  AttentionDropout(const AttentionParams& params, WorkspaceAllocator& workspace)
      : p(params), words(drops(params) ? workspace.take<uint32_t>(kStrip * kStrip) : nullptr) {}

  static bool drops(const AttentionParams& p) { return p.mask.threshold != 0; }

  // Draws the mask of `keys` keys from k0 on, for the strip of rows at r0.
  void draw(int64_t head, int64_t r0, int64_t k0, int64_t keys) const {
    if (!words) return;
    const int64_t first = p.mask_first + head * p.mask.ld + r0 * p.keys + k0 * kStrip;
    for_mask(p.mask, first, keys * kStrip, [&](int64_t at, const uint32_t* from, int64_t count) {
      memcpy(words + at, from, count * sizeof(*from));
    });
  }
  // x where the lanes from c on keep a key of the block, scaled; else 0.
  Vec kept(int64_t key, int64_t c, Vec x) const {
    return words ? mul(x, keep_factors(words + key * kStrip + c, p.mask.threshold, p.mask.scale)) : x;
  }
};
