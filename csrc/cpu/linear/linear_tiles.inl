// bf16 GEMMs on AMX tiles, for gemm_packed and gemm_nn: kVectors tiles of sums side by side share each tile
// of `rows`, the operand that is used in place (decoded rows of the weight, rows of dy); the other operand is
// already in pairs.
//
//   rows [16][32 elements]   x   pairs [16][lanes]   ->   sums [16][lanes]

constexpr int kTileDim = 16;    // rows of a tile, and fp32 or pairs in a row
constexpr int kTileDepth = 32;  // elements summed by one instruction

// Calls visit(row, column) for a grid of tiles, with constants: tile registers are encoded in the
// instruction.
template <int kRows, int kCols, int kAt = 0, class Visit>
inline void for_tiles(const Visit& visit) {
  if constexpr (kAt < kRows * kCols) {
    visit(Constant<kAt / kCols>{}, Constant<kAt % kCols>{});
    for_tiles<kRows, kCols, kAt + 1>(visit);
  }
}

// What to prefetch: this many cache lines per step.
struct TilePrefetch {
  const char* at = nullptr;
  int64_t lines = 0;
};

// kRowTiles tiles of rows times kVectors vectors of lanes, at most four tiles of sums, which are added to
// memory or stored there. Rows of `pairs` are pair_bytes apart.
template <int kRowTiles, int kVectors>
void tiles_block(const void* rows, int64_t row_bytes, const void* pairs, int64_t pair_bytes, int64_t steps,
                 bool adds, float* sums, int64_t sums_ld, TilePrefetch ahead = {}) {
  static_assert(kRowTiles * kVectors <= 4, "");
  const int64_t sums_bytes = sums_ld * sizeof(float);
  const auto* a = static_cast<const char*>(rows);
  const auto* b = static_cast<const char*>(pairs);
  const auto sums_at = [&](int r, int v) { return sums + r * kTileDim * sums_ld + v * kTileDim; };
  if (adds) {
    for_tiles<kRowTiles, kVectors>(
        [&](auto r, auto v) { tile_load<r * kVectors + v>(sums_at(r, v), sums_bytes); });
  } else {
    for_tiles<kRowTiles, kVectors>([](auto r, auto v) { tile_zero<r * kVectors + v>(); });
  }
  for (int64_t s = 0; s < steps; ++s, a += 2 * kTileDepth, b += kTileDim * pair_bytes) {
    // Tiles 4 and 5 alternate for rows, 6 and 7 for lanes, so that a load need not wait for the last
    // multiplication.
    for_tiles<kRowTiles, 1>([&](auto r, auto) {
      tile_load<4 + r % 2>(a + r * kTileDim * row_bytes, row_bytes);
      for_tiles<1, kVectors>([&](auto, auto v) {
        if constexpr (r == 0) tile_load<6 + v % 2>(b + v * 64, pair_bytes);
        tile_dot_pairs<r * kVectors + v, 4 + r % 2, 6 + v % 2>();
      });
    });
    for (int64_t i = 0; i < ahead.lines; ++i, ahead.at += 64) __builtin_prefetch(ahead.at);
  }
  for_tiles<kRowTiles, kVectors>(
      [&](auto r, auto v) { tile_store<r * kVectors + v>(sums_at(r, v), sums_bytes); });
}
