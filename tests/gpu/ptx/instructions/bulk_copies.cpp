// cp.async.bulk: copies that a unit makes of linear memory, or of a box of a tensor that a TensorMap
// describes. They land at a random later time, together with their bytes at an mbarrier.
#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include "../machine/machine.h"
#include "../machine/memory.h"
#include "../machine/swizzle.h"
#include "../machine/tensor_map.h"
#include "../machine/warp.h"
#include "decode.h"

namespace ptx {

// Rows of memory, and where each 16 bytes of them go in shared memory.
struct BulkCopy {
  uint64_t from = 0;  // address of element (0, 0), which need not be within the tensor
  int64_t row_bytes = 0;
  int32_t rows = 1, bytes = 0;           // of the box
  int32_t first_row = 0, end_row = 1;    // of those, in bounds: others are zero
  int32_t first_byte = 0, end_byte = 0;  // likewise
  uint64_t to = 0;                       // address in shared memory
  uint32_t span = 16;
  uint64_t barrier = 0;

  std::vector<char> gather() const {
    std::vector<char> all(static_cast<size_t>(rows) * static_cast<size_t>(bytes));
    for (int32_t row = first_row; row < end_row && first_byte < end_byte; ++row) {
      const uint64_t source = from + static_cast<uint64_t>(row * row_bytes + first_byte);
      std::memcpy(&all[static_cast<size_t>(row * bytes + first_byte)], reinterpret_cast<const char*>(source),
                  static_cast<size_t>(end_byte - first_byte));
    }
    return all;
  }
};

namespace {

constexpr uint32_t kUnit = 16;

}  // namespace

void Memory::copy_bulk(Warp& warp, int lane, const BulkCopy& copy, const Instruction& at) {
  Mbarrier& barrier = mbarrier_of(warp, lane, copy.barrier, at);
  if (!barrier.fenced) {
    fail(warp, lane, at.site,
         "a bulk copy to an mbarrier whose init no fence.mbarrier_init or fence.proxy.async follows");
  }
  uint64_t addresses[kLanes] = {};
  addresses[lane] = copy.from;
  now = {&warp, &at, addresses, 0};
  std::vector<char> data = copy.gather();
  now = {};
  std::vector<uint32_t> places;
  for (uint32_t byte = 0; byte < data.size(); byte += kUnit) {
    const uint32_t offset = shared_offset(warp, lane, swizzled(copy.to + byte, copy.span), kUnit, at);
    const SharedAccess access = as_access(warp, lane, at.site);
    check(warp.block->shadow->write(offset, kUnit, access, true), warp, lane, true, at);
    std::memset(warp.block->storage + offset, 0xff, kUnit);  // NaN
    places.push_back(offset);
  }
  ++barrier.in_flight;
  Mbarrier* const to = &barrier;
  Warp* const by = &warp;
  const Instruction* const instruction = &at;
  const auto land_all = [this, by, lane, to, instruction, copy, data, places] {
    const uint16_t site = instruction->site;
    if (copy.gather() != data) {
      fail(*by, lane, site, "the source of an asynchronous copy changed before it landed");
    }
    SharedAccess access = as_access(*by, lane, site);
    access.thread = Units::bulk_copy(to->index);
    access.now = advance();
    for (size_t i = 0; i < places.size(); ++i) {
      std::memcpy(by->block->storage + places[i], &data[i * kUnit], kUnit);
      by->block->shadow->written(places[i], kUnit, access);
    }
    --to->in_flight;
    to->arriving.know(access.thread, advance());
    expect_bytes(*by, lane, *to, -static_cast<int64_t>(data.size()), *instruction);
    if (to->is_done()) to->next_phase();
  };
  warp.block->async->landings.push_back({land_all, static_cast<uint32_t>(thread_of(warp, lane)), at.site});
}

namespace {

// Addresses of one of several address operands of an instruction: those after the first are in the list, as
// a register, its bytes, and what is added to it.
uint64_t address_of(const Warp& warp, const Instruction& i, int which, int lane) {
  const int32_t* const entry = i.list + 3 * which;
  const uint64_t base = entry[1] == 8 ? warp.in<uint64_t>(entry[0])[lane] : warp.in<uint32_t>(entry[0])[lane];
  return base + static_cast<uint64_t>(static_cast<int64_t>(entry[2]));
}
void add_address(Decoder& decoder, const Operand& operand, std::vector<int32_t>& list) {
  Instruction read;
  set_address(decoder, read, operand);
  list.insert(list.end(), {read.a, read.address, static_cast<int32_t>(read.offset)});
}

// Operands in the list: destination, source, mbarrier.
enum : int { kTo, kFrom, kBarrier };

void require_aligned(const Warp& warp, int lane, const Instruction& i, uint64_t value, uint64_t by,
                     const char* what) {
  if (value % by != 0) {
    fail(warp, lane, i.site,
         std::string(what) + " of a bulk copy is not a multiple of " + std::to_string(by));
  }
}

void copy_linear(Warp& warp, const Instruction& i) {
  const auto* bytes = warp.in<uint32_t>(i.c);
  for_lanes(warp.active, [&](int lane) {
    BulkCopy copy;
    copy.to = address_of(warp, i, kTo, lane);
    copy.from = address_of(warp, i, kFrom, lane);
    copy.barrier = address_of(warp, i, kBarrier, lane);
    copy.bytes = copy.end_byte = static_cast<int32_t>(bytes[lane]);
    require_aligned(warp, lane, i, copy.to, kUnit, "the destination");
    require_aligned(warp, lane, i, copy.from, kUnit, "the source");
    require_aligned(warp, lane, i, bytes[lane], kUnit, "the size");
    if (copy.bytes <= 0) fail(warp, lane, i.site, "an empty bulk copy");
    warp.memory->copy_bulk(warp, lane, copy, i);
  });
}

TensorMap map_at(const Warp& warp, int lane, const Instruction& i, uint64_t address) {
  const auto first = reinterpret_cast<uint64_t>(grid.parameters.data());
  if (address < first || address + TensorMap::kBytes > first + grid.parameters.size()) {
    fail(warp, lane, i.site, "a tensor map that is no parameter of the kernel");
  }
  require_aligned(warp, lane, i, address - first, 64, "the tensor map");
  TensorMap map;
  std::memcpy(&map, reinterpret_cast<const void*>(address), sizeof(map));
  if (map.mark != TensorMap::kMark) fail(warp, lane, i.site, "this is not a tensor map");
  return map;
}

void copy_box(Warp& warp, const Instruction& i) {
  const auto* column = warp.in<int32_t>(i.a);
  const auto* row = warp.in<int32_t>(i.b);
  for_lanes(warp.active, [&](int lane) {
    const TensorMap map = map_at(warp, lane, i, address_of(warp, i, kFrom, lane));
    BulkCopy copy;
    copy.to = address_of(warp, i, kTo, lane);
    copy.barrier = address_of(warp, i, kBarrier, lane);
    copy.rows = map.box[1];
    copy.bytes = map.box[0] * map.element_bytes;
    copy.row_bytes = map.row_bytes;
    copy.span = map.span;
    constexpr uint64_t kAlign = 128;
    require_aligned(warp, lane, i, copy.to, kAlign, "the destination");
    if (map.span > kUnit && copy.bytes != static_cast<int32_t>(map.span)) {
      fail(warp, lane, i.site, "a box narrower than its swizzle: not modelled");
    }
    const auto inside = [](int64_t first, int64_t size, int64_t box) {
      return std::pair(std::clamp<int64_t>(-first, 0, box), std::clamp<int64_t>(size - first, 0, box));
    };
    const auto [first_row, end_row] = inside(row[lane], map.size[1], map.box[1]);
    const auto [first_column, end_column] = inside(column[lane], map.size[0], map.box[0]);
    copy.first_row = static_cast<int32_t>(first_row);
    copy.end_row = static_cast<int32_t>(end_row);
    copy.first_byte = static_cast<int32_t>(first_column * map.element_bytes);
    copy.end_byte = static_cast<int32_t>(end_column * map.element_bytes);
    copy.from = map.address +
                static_cast<uint64_t>(row[lane] * map.row_bytes + int64_t{column[lane]} * map.element_bytes);
    warp.memory->copy_bulk(warp, lane, copy, i);
  });
}

void no_operation(Warp&, const Instruction&) {}

}  // namespace

bool decode_bulk_copy(Decoder& decoder, const Decoder::Words& words) {
  Instruction instruction = decoder.begin();
  instruction.kind = Kind::kAtomic;
  if (words[0] == "prefetch" && words[1] == "tensormap") {
    instruction.execute = no_operation;
    decoder.emit(instruction);
    return true;
  }
  if (words[0] != "cp" || words[1] != "async" || words[2] != "bulk") return false;
  const bool is_box = words[3] == "tensor";
  const size_t space = is_box ? 5 : 3;
  if (is_box && words[4] != "2d") return false;
  const bool to_shared = words[space] == "shared::cluster" || words[space] == "shared::cta";
  if (!to_shared || words[space + 1] != "global" || !words.has("mbarrier::complete_tx::bytes")) return false;
  for (size_t k = space + 2; k < words.parts.size(); ++k) {
    const bool is_known =
        words[k] == "mbarrier::complete_tx::bytes" || words[k] == "tile" || words[k] == "L2::cache_hint";
    if (!is_known) return false;
  }
  std::vector<int32_t> list;
  add_address(decoder, decoder.operand(0), list);
  add_address(decoder, decoder.operand(1), list);
  add_address(decoder, decoder.operand(is_box ? 2 : 3), list);
  if (is_box) {
    const std::vector<Operand>& coordinates = decoder.operand(1).list;
    if (coordinates.size() != 2) decoder.fail("expected two coordinates");
    instruction.a = decoder.source(coordinates[0], 4);
    instruction.b = decoder.source(coordinates[1], 4);
    instruction.execute = copy_box;
  } else {
    instruction.c = decoder.source(decoder.operand(2), 4);
    instruction.execute = copy_linear;
  }
  decoder.set_list(list);
  decoder.emit_async(instruction);
  return true;
}

}  // namespace ptx
