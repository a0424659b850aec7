// The interface of tiles_amx.h with the instructions emulated, for tests on machines without them.

struct Tiles {
  Tiles() {}
  ~Tiles() {}
};

inline uint32_t (*tile(int index))[16] {
  thread_local uint32_t tiles[8][16][16];
  return tiles[index];
}

template <int kTile>
inline void tile_zero() {
  memset(tile(kTile), 0, sizeof(uint32_t[16][16]));
}
template <int kTile>
inline void tile_load(const void* p, int64_t row_bytes) {
  for (int r = 0; r < 16; ++r) memcpy(tile(kTile)[r], static_cast<const char*>(p) + r * row_bytes, 64);
}
template <int kTile>
inline void tile_store(void* p, int64_t row_bytes) {
  for (int r = 0; r < 16; ++r) memcpy(static_cast<char*>(p) + r * row_bytes, tile(kTile)[r], 64);
}
template <int kSums, int kA, int kB>
inline void tile_dot_pairs() {
  for (int i = 0; i < 16; ++i) {
    float* row = reinterpret_cast<float*>(tile(kSums)[i]);
    Vec sums = load(row);
    for (int p = 0; p < 16; ++p) sums = dot_pairs(load_pairs(tile(kB)[p]), splat_pair(&tile(kA)[i][p]), sums);
    store(row, sums);
  }
}
