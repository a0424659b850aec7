// mma and ldmatrix. Below, g = lane / 4 and t = lane % 4.
#include <algorithm>
#include <cstring>
#include <string>

#include "../machine/machine.h"
#include "../machine/memory.h"
#include "../machine/warp.h"
#include "decode.h"
#include "numbers.h"
#include "sums.h"

namespace ptx {
namespace {

constexpr int kM = 16, kN = 8;

template <int kK>
struct Operands {
  alignas(64) float a[kM][kK], b[kK][kN], c[kM][kN];
};

template <int kK>
void multiply(Operands<kK>& o) {
  if (!options().truncate_sums) {
    for (int k = 0; k < kK; ++k) {
      for (int m = 0; m < kM; ++m) {
        for (int n = 0; n < kN; ++n) o.c[m][n] = multiply_add(o.a[m][k], o.b[k][n], o.c[m][n]);
      }
    }
    return;
  }
  const bool is_later = grid.target >= 90;
  const int step = kK / (is_later ? 1 : 2), extra_bits = is_later ? 2 : 1;
  for (int m = 0; m < kM; ++m) {
    for (int n = 0; n < kN; ++n) {
      for (int k = 0; k < kK; k += step) {
        o.c[m][n] = truncated_sum(o.c[m][n], &o.a[m][k], &o.b[k][n], kN, step, extra_bits);
      }
    }
  }
}

// The operand list: four of d, of a, two of b, four of c. Accumulators: (g, 2t..), (g + 8, 2t..).
constexpr int kA = 4, kB = 8, kC = 10;

template <int kK>
void read_accumulators(const Warp& warp, const Instruction& i, Operands<kK>& o) {
  for (int j = 0; j < 4; ++j) {
    const auto* c = warp.in<float>(i.list[kC + j]);
    for (int lane = 0; lane < kLanes; ++lane) o.c[lane / 4 + 8 * (j / 2)][2 * (lane % 4) + j % 2] = c[lane];
  }
}
template <int kK>
void write_accumulators(const Warp& warp, const Instruction& i, const Operands<kK>& o) {
  for (int j = 0; j < 4; ++j) {
    auto* const d = warp.out<float>(i.list[j]);
    for (int lane = 0; lane < kLanes; ++lane) d[lane] = o.c[lane / 4 + 8 * (j / 2)][2 * (lane % 4) + j % 2];
  }
}

// a: (g, 2t..), (g + 8, 2t..), (g, 2t + 8..), (g + 8, 2t + 8..);  b: rows 2t.. and 2t + 8.. of column g.
template <class Number>
void multiply_halves(Warp& warp, const Instruction& i) {
  Operands<16> o;
  alignas(64) float low[kLanes], high[kLanes];
  const auto read = [&](int operand) {
    const auto* pairs = warp.in<uint32_t>(i.list[operand]);
    for (int lane = 0; lane < kLanes; ++lane) {
      low[lane] = Number::widen(static_cast<uint16_t>(pairs[lane]));
      high[lane] = Number::widen(static_cast<uint16_t>(pairs[lane] >> 16));
    }
  };
  for (int j = 0; j < 4; ++j) {
    read(kA + j);
    for (int lane = 0; lane < kLanes; ++lane) {
      float* const at = &o.a[lane / 4 + 8 * (j % 2)][2 * (lane % 4) + 8 * (j / 2)];
      at[0] = low[lane];
      at[1] = high[lane];
    }
  }
  for (int j = 0; j < 2; ++j) {
    read(kB + j);
    for (int lane = 0; lane < kLanes; ++lane) {
      const int k = 2 * (lane % 4) + 8 * j;
      o.b[k][lane / 4] = low[lane];
      o.b[k + 1][lane / 4] = high[lane];
    }
  }
  read_accumulators(warp, i, o);
  multiply(o);
  write_accumulators(warp, i, o);
}

// a: (g, t), (g + 8, t), (g, t + 4), (g + 8, t + 4);  b: rows t and t + 4 of column g.
void multiply_tf32(Warp& warp, const Instruction& i) {
  const auto upper_19_bits = [](uint32_t bits) { return bits_as<float>(bits & 0xffffe000u); };
  Operands<8> o;
  for (int j = 0; j < 4; ++j) {
    const auto* a = warp.in<uint32_t>(i.list[kA + j]);
    for (int lane = 0; lane < kLanes; ++lane) {
      o.a[lane / 4 + 8 * (j % 2)][lane % 4 + 4 * (j / 2)] = upper_19_bits(a[lane]);
    }
  }
  for (int j = 0; j < 2; ++j) {
    const auto* b = warp.in<uint32_t>(i.list[kB + j]);
    for (int lane = 0; lane < kLanes; ++lane) o.b[lane % 4 + 4 * j][lane / 4] = upper_19_bits(b[lane]);
  }
  read_accumulators(warp, i, o);
  multiply(o);
  write_accumulators(warp, i, o);
}

bool decode_mma(Decoder& decoder, const Decoder::Words& words) {
  const std::string shape(words[3]), layouts = std::string(words[4]) + "." + std::string(words[5]);
  const std::string_view type = words[7];
  if (words[1] != "sync" || words[2] != "aligned" || layouts != "row.col" || words.parts.size() != 10)
    return false;
  if (words[6] != "f32" || words[8] != type || words[9] != "f32") return false;
  Instruction instruction = decoder.begin();
  instruction.kind = Kind::kCollective;
  instruction.members = decoder.constant(-1, 4);
  if (shape == "m16n8k16" && type == "bf16") {
    instruction.execute = multiply_halves<Bf16>;
  } else if (shape == "m16n8k16" && type == "f16") {
    instruction.execute = multiply_halves<Fp16>;
  } else if (shape == "m16n8k8" && type == "tf32") {
    instruction.execute = multiply_tf32;
  } else {
    return false;
  }
  std::vector<int32_t> list;
  constexpr size_t kCounts[] = {4, 4, 2, 4};
  for (size_t k = 0; k < 4; ++k) {
    const std::vector<Operand>& operands = decoder.operand(k).list;
    if (operands.size() != kCounts[k]) decoder.fail("unexpected number of registers");
    for (const Operand& each : operands) {
      list.push_back(k == 0 ? decoder.destination(each, 4) : decoder.source(each, 4));
    }
  }
  decoder.set_list(list);
  decoder.emit(instruction);
  return true;
}

// Lane 8 j + row has the address of that row of matrix j, 8 values of 16 bits. Each lane gets (g, 2t..) of
// the matrix or its transpose.
template <bool kTransposed>
void load_matrices(Warp& warp, const Instruction& i) {
  uint64_t addresses[kLanes];
  read_addresses(warp, i, addresses);
  char* rows[kLanes];
  const uint32_t all = warp.active;
  const int count = i.count;
  warp.active = count == 4 ? kAllLanes : (1u << 8 * count) - 1;
  warp.memory->find_shared(warp, addresses, 16, Access::kRead, i, rows);
  warp.active = all;
  for (int j = 0; j < count; ++j) {
    auto* const to = warp.out<uint32_t>(i.list[j]);
    for (int lane = 0; lane < kLanes; ++lane) {
      const int g = lane / 4, t = lane % 4;
      uint16_t pair[2];
      for (int k = 0; k < 2; ++k) {
        const int row = kTransposed ? 2 * t + k : g, column = kTransposed ? g : 2 * t + k;
        std::memcpy(&pair[k], rows[8 * j + row] + 2 * column, 2);
      }
      to[lane] = uint32_t{pair[1]} << 16 | pair[0];
    }
  }
}

bool decode_ldmatrix(Decoder& decoder, const Decoder::Words& words) {
  const bool is_known = words[1] == "sync" && words[2] == "aligned" && words[3] == "m8n8" &&
                        words.last() == "b16" && (words.has("shared") || words.has("shared::cta"));
  if (!is_known || words[4].size() != 2) return false;
  Instruction instruction = decoder.begin();
  instruction.kind = Kind::kCollective;
  instruction.members = decoder.constant(-1, 4);
  instruction.count = static_cast<uint8_t>(words[4][1] - '0');
  instruction.execute = words.has("trans") ? load_matrices<true> : load_matrices<false>;
  set_address(decoder, instruction, decoder.operand(1));
  const Operand& to = decoder.operand(0);
  std::vector<int32_t> list;
  if (to.kind == Operand::Kind::kList) {
    for (const Operand& each : to.list) list.push_back(decoder.destination(each, 4));
  } else {
    list.push_back(decoder.destination(to, 4));
  }
  if (list.size() != instruction.count) return false;
  decoder.set_list(list);
  decoder.emit(instruction);
  return true;
}

}  // namespace

bool decode_matrix(Decoder& decoder, const Decoder::Words& words) {
  if (words[0] == "mma") return decode_mma(decoder, words);
  return words[0] == "ldmatrix" && decode_ldmatrix(decoder, words);
}

}  // namespace ptx
