// wgmma: a warpgroup's unit multiplies matrices on its own. The result is computed when the last of the four
// warps arrives; the checks see to it that no program can tell.
//
// Registers: see RegistersInFlight. Shared memory that the unit reads counts as read until a thread that has
// waited for the operation orders later writes after it.
#include <cstring>
#include <string>
#include <vector>

#include "../machine/machine.h"
#include "../machine/memory.h"
#include "../machine/swizzle.h"
#include "../machine/warp.h"
#include "decode.h"
#include "numbers.h"
#include "sums.h"
#include "warpgroups.h"

namespace ptx {

void Memory::read_by_unit(const Warp& warp, const Clock& clock, uint32_t offset, int warpgroup,
                          const Instruction& at) {
  SharedAccess access = as_access(warp, 0, at.site);
  access.clock = &clock;
  constexpr uint32_t kBytes = 16;
  check(warp.block->shadow->read_by_unit(offset, kBytes, access, warpgroup), warp, 0, false, at);
}

namespace {

constexpr int kM = 64, kK = 16, kMaxN = 256, kUnitBytes = 16, kUnitValues = 8;

// In Instruction::target.
constexpr uint32_t kNegateA = 1, kNegateB = 2, kTransposeA = 4, kTransposeB = 8, kRegistersOfA = 16;

// The matrix descriptor of the PTX ISA.
struct Descriptor {
  uint64_t start, leading, stride;
  uint32_t span;  // bytes of a swizzled row; 16: not swizzled

  Descriptor(uint64_t bits, const Warp& warp, const Instruction& i) {
    const auto field = [&](int first) { return (bits >> first & 0x3fff) << 4; };
    start = field(0);
    leading = field(16);
    stride = field(32);
    constexpr uint32_t kSpans[] = {16, 128, 64, 32};
    span = kSpans[bits >> 62];
    constexpr uint64_t kUnused = 0x3ff1'c000'c000'c000 & ~(uint64_t{7} << 49);
    if ((bits >> 49 & 7) != 0)
      fail(warp, warp.active, i, "a base offset in a matrix descriptor: not modelled");
    if ((bits & kUnused) != 0) fail(warp, warp.active, i, "a matrix descriptor with undefined bits set");
  }

  // Of 8 values of one row (of A, or of B's transpose) along k, or transposed: of one k along the rows.
  uint64_t unit(int row, int k, bool transposed) const {
    const auto r = static_cast<uint64_t>(row), c = static_cast<uint64_t>(k);
    if (span == kUnitBytes) {
      return transposed ? start + r / 8 * stride + c / 8 * leading + c % 8 * kUnitBytes
                        : start + r / 8 * stride + c / 8 * leading + r % 8 * kUnitBytes;
    }
    const uint64_t values = span / 2;  // in a row of the pattern
    const uint64_t plain = transposed
                               ? start + r / values * leading + r % values * 2 + c / 8 * stride + c % 8 * span
                               : start + r / 8 * stride + r % 8 * span + c * 2;
    return swizzled(plain, span);
  }
};

struct Operands {
  alignas(64) float a[kM][kK], b[kK][kMaxN], d[kM][kMaxN];
};

template <class T>
const typename Aliasing<T>::type* registers_of(const Block& block, int index, int32_t at) {
  return block.warps[static_cast<size_t>(index)]->in<T>(at);
}

// Reads `rows` by 16 values; to(row, k, value).
template <class Number, class To>
void read_matrix(Warp& warp, const Instruction& i, uint64_t bits, int rows, bool transposed,
                 const Clock& clock, const To& to) {
  const Descriptor descriptor(bits, warp, i);
  const int row_step = transposed ? kUnitValues : 1, k_step = transposed ? 1 : kUnitValues;
  for (int row = 0; row < rows; row += row_step) {
    for (int k = 0; k < kK; k += k_step) {
      const uint64_t address = descriptor.unit(row, k, transposed);
      const uint32_t offset = warp.memory->shared_place(warp, 0, address, kUnitBytes, i);
      warp.memory->read_by_unit(warp, clock, offset, warp.index / kWarpsPerGroup, i);
      uint16_t values[kUnitValues];
      std::memcpy(values, warp.block->storage + offset, sizeof(values));
      for (int each = 0; each < kUnitValues; ++each) {
        to(row + (transposed ? each : 0), k + (transposed ? 0 : each), Number::widen(values[each]));
      }
    }
  }
}

void multiply(Operands& o, int n) {
  for (int m = 0; m < kM; ++m) {
    if (options().truncate_sums) {
      constexpr int kExtraBits = 2;
      for (int j = 0; j < n; ++j)
        o.d[m][j] = truncated_sum(o.d[m][j], o.a[m], &o.b[0][j], kMaxN, kK, kExtraBits);
    } else {
      for (int k = 0; k < kK; ++k) {
        for (int j = 0; j < n; ++j) o.d[m][j] = multiply_add(o.a[m][k], o.b[k][j], o.d[m][j]);
      }
    }
  }
}

// Accumulator j of a warp's lane: row g, or g + 8 for odd pairs; a pair of columns for each 8.
template <class Visit>
void for_accumulators(const Instruction& i, const Block& block, int first_warp, const Visit& visit) {
  for (int w = 0; w < kWarpsPerGroup; ++w) {
    for (int j = 0; j < 4 * i.count; ++j) {
      auto* const d = block.warps[static_cast<size_t>(first_warp + w)]->out<float>(i.list[j]);
      for (int lane = 0; lane < kLanes; ++lane) {
        visit(16 * w + lane / 4 + j / 2 % 2 * 8, j / 4 * 8 + lane % 4 * 2 + j % 2, d[lane]);
      }
    }
  }
}

template <class Number>
void read_registers_of_a(const Instruction& i, const Block& block, int first_warp, Operands& o) {
  for (int w = 0; w < kWarpsPerGroup; ++w) {
    for (int j = 0; j < 4; ++j) {
      const auto* pairs = registers_of<uint32_t>(block, first_warp + w, i.list[4 * i.count + j]);
      for (int lane = 0; lane < kLanes; ++lane) {
        float* const at = &o.a[16 * w + lane / 4 + j % 2 * 8][lane % 4 * 2 + j / 2 * 8];
        at[0] = Number::widen(static_cast<uint16_t>(pairs[lane]));
        at[1] = Number::widen(static_cast<uint16_t>(pairs[lane] >> 16));
      }
    }
  }
}

// The value that all threads of the warpgroup must have.
uint64_t uniform(const Warp& warp, const Instruction& i, int32_t at, int first_warp, const char* what) {
  const uint64_t value = registers_of<uint64_t>(*warp.block, first_warp, at)[0];
  for (int w = 0; w < kWarpsPerGroup; ++w) {
    const auto* values = registers_of<uint64_t>(*warp.block, first_warp + w, at);
    for (int lane = 0; lane < kLanes; ++lane) {
      if (values[lane] != value) {
        fail(*warp.block->warps[static_cast<size_t>(first_warp + w)], lane, i.site,
             std::string("threads of a warpgroup with different ") + what);
      }
    }
  }
  return value;
}

bool adds(const Warp& warp, const Instruction& i, int first_warp) {
  const uint32_t first = *registers_of<uint32_t>(*warp.block, first_warp, i.c);
  for (int w = 0; w < kWarpsPerGroup; ++w) {
    const uint32_t lanes = *registers_of<uint32_t>(*warp.block, first_warp + w, i.c);
    if (lanes != first || (lanes != 0 && lanes != kAllLanes)) {
      fail(warp, warp.active, i, "threads of a warpgroup with different scale-d");
    }
  }
  return first != 0;
}

// Numbers of registers follow the places in the list.
template <class Visit>
void for_numbers(const Instruction& i, const Visit& visit) {
  const int accumulators = 4 * i.count, operands = (i.target & kRegistersOfA) != 0 ? 4 : 0;
  const int32_t* const numbers = i.list + accumulators + operands;
  for (int j = 0; j < accumulators + operands; ++j) visit(numbers[j], j >= accumulators);
}

void check_registers(const Warp& warp, const Instruction& i) {
  const RegistersInFlight& registers = warp.block->async->registers[static_cast<size_t>(warp.index)];
  if (!registers.has_fenced()) fail(warp, warp.active, i, "wgmma before the first wgmma.fence");
  for_numbers(i, [&](int32_t reg, bool is_operand) {
    if (reg < 0) return;
    const std::string name = is_operand ? "A" : "an accumulator";
    if (!registers.is_fenced(reg)) {
      fail(warp, warp.active, i, "wgmma with " + name + " that was written after the last wgmma.fence");
    }
    if (registers.is_in_flight(reg) && registers.state(reg).is_operand != is_operand) {
      fail(warp, warp.active, i,
           "wgmma with " + name + " that another (" + site_text(registers.state(reg).site) +
               ") has in flight as " + (is_operand ? "accumulator" : "its A"));
    }
  });
}

template <class Number>
void multiply_async(Warp& warp, const Instruction& i) {
  check_registers(warp, i);
  const Meeting& meeting = meet_warpgroup(warp, i);
  if (meeting.arrived < meeting.count) return;
  static Operands o;
  Block& block = *warp.block;
  const int group = warp.index / kWarpsPerGroup, first_warp = group * kWarpsPerGroup, n = 8 * i.count;
  const uint32_t tick = warp.memory->advance();
  Clock common = block.async->clocks[static_cast<size_t>(first_warp * kLanes)];
  for (int thread = 1; thread < kWarpsPerGroup * kLanes; ++thread) {
    common.meet(block.async->clocks[static_cast<size_t>(first_warp * kLanes + thread)]);
  }
  const bool keeps = adds(warp, i, first_warp);
  for_accumulators(i, block, first_warp,
                   [&](int row, int column, float& d) { o.d[row][column] = keeps ? d : 0; });
  if ((i.target & kRegistersOfA) != 0) {
    read_registers_of_a<Number>(i, block, first_warp, o);
  } else {
    const uint64_t a = uniform(warp, i, i.a, first_warp, "descriptors of A");
    read_matrix<Number>(warp, i, a, kM, (i.target & kTransposeA) != 0, common,
                        [&](int row, int k, float value) { o.a[row][k] = value; });
  }
  const uint64_t b = uniform(warp, i, i.b, first_warp, "descriptors of B");
  read_matrix<Number>(warp, i, b, n, (i.target & kTransposeB) != 0, common,
                      [&](int row, int k, float value) { o.b[k][row] = value; });
  // Both signs of one product cancel.
  if (((i.target & kNegateA) != 0) != ((i.target & kNegateB) != 0)) {
    for (auto& row : o.a) {
      for (float& value : row) value = -value;
    }
  }
  multiply(o, n);
  for_accumulators(i, block, first_warp, [&](int row, int column, float& d) { d = o.d[row][column]; });
  for (int w = 0; w < kWarpsPerGroup; ++w) {
    RegistersInFlight& registers = block.async->registers[static_cast<size_t>(first_warp + w)];
    registers.issue(tick);
    for_numbers(i, [&](int32_t reg, bool is_operand) {
      if (reg >= 0) registers.use(reg, i.site, is_operand);
    });
  }
}

RegistersInFlight& registers_of(const Warp& warp) {
  return warp.block->async->registers[static_cast<size_t>(warp.index)];
}
void fence(Warp& warp, const Instruction&) { registers_of(warp).fence(); }
void commit(Warp& warp, const Instruction&) { registers_of(warp).commit(); }
void wait(Warp& warp, const Instruction& i) {
  const uint32_t last = registers_of(warp).wait(static_cast<int>(i.target));
  if (last == 0) return;
  const uint16_t unit = Units::warpgroup(warp.index / kWarpsPerGroup);
  for (int lane = 0; lane < kLanes; ++lane) clock_of(warp, lane).know(unit, last + 1);
}

// One of imm-scale-a, imm-scale-b, imm-trans-a, imm-trans-b.
bool read_flag(const Operand& operand, bool is_scale, uint32_t flag, uint32_t& flags) {
  if (operand.kind != Operand::Kind::kImmediate) return false;
  if (is_scale ? operand.value != 1 && operand.value != -1 : operand.value != 0 && operand.value != 1)
    return false;
  if (operand.value == (is_scale ? -1 : 1)) flags |= flag;
  return true;
}

bool decode_multiply(Decoder& decoder, const Decoder::Words& words, Instruction& instruction) {
  const std::string shape(words[4]);
  const std::string_view type = words[6];
  if (words.parts.size() != 8 || shape.substr(0, 4) != "m64n" || shape.size() < 8 || words[5] != "f32" ||
      words[7] != type || (type != "bf16" && type != "f16")) {
    return false;
  }
  const int n = std::atoi(shape.c_str() + 4);
  if (n < 8 || n > kMaxN || n % 8 != 0 || shape != "m64n" + std::to_string(n) + "k16") return false;
  instruction.count = static_cast<uint8_t>(n / 8);
  instruction.execute = type == "bf16" ? multiply_async<Bf16> : multiply_async<Fp16>;

  std::vector<int32_t> places, numbers;
  const auto add = [&](const Operand& operand, size_t count, bool is_result) {
    if (operand.list.size() != count) decoder.fail("unexpected number of registers");
    for (const Operand& each : operand.list) {
      places.push_back(is_result ? decoder.destination(each, 4) : decoder.source(each, 4));
      numbers.push_back(each.reg);
    }
  };
  add(decoder.operand(0), static_cast<size_t>(n / 2), true);
  const bool has_registers = decoder.operand(1).kind == Operand::Kind::kList;
  if (has_registers) {
    add(decoder.operand(1), 4, false);
    instruction.target |= kRegistersOfA;
  } else {
    instruction.a = decoder.source(decoder.operand(1), 8);
  }
  instruction.b = decoder.source(decoder.operand(2), 8);
  instruction.c = decoder.source(decoder.operand(3), 0);
  if (decoder.statement().operands.size() != (has_registers ? 7u : 8u)) return false;
  if (!read_flag(decoder.operand(4), true, kNegateA, instruction.target) ||
      !read_flag(decoder.operand(5), true, kNegateB, instruction.target)) {
    return false;
  }
  if (!has_registers && !read_flag(decoder.operand(6), false, kTransposeA, instruction.target)) return false;
  if (!read_flag(decoder.operand(has_registers ? 6 : 7), false, kTransposeB, instruction.target))
    return false;
  places.insert(places.end(), numbers.begin(), numbers.end());
  decoder.set_list(places);
  return true;
}

}  // namespace

bool decode_wgmma(Decoder& decoder, const Decoder::Words& words) {
  if (words[0] != "wgmma" || words[2] != "sync" || words[3] != "aligned") return false;
  require_sm_90a(decoder);
  Instruction instruction = decoder.begin();
  instruction.kind = Kind::kCollective;
  instruction.members = decoder.constant(-1, 4);
  if (words[1] == "mma_async") {
    instruction.kind = Kind::kMeeting;
    if (!decode_multiply(decoder, words, instruction)) return false;
  } else if (words[1] == "fence") {
    instruction.execute = fence;
  } else if (words[1] == "commit_group") {
    instruction.execute = commit;
  } else if (words[1] == "wait_group") {
    instruction.target = static_cast<uint32_t>(decoder.operand(0).value);
    instruction.execute = wait;
  } else {
    return false;
  }
  decoder.emit_async(instruction);
  return true;
}

}  // namespace ptx
