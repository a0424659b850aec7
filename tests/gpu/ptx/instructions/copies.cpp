// cp.async: copies from global to shared memory that land at any time until they are waited for.
#include <cstring>
#include <string>

#include "../machine/memory.h"
#include "../machine/warp.h"
#include "decode.h"

namespace ptx {

void Memory::copy_async(Warp& warp, const uint64_t (&to)[kLanes], const uint64_t (&from)[kLanes],
                        const uint32_t (&read)[kLanes], int bytes, const Instruction& at) {
  char* places[kLanes];
  find_shared(warp, to, bytes, Access::kWrite, at, places);
  const uint32_t all = warp.active;
  char* sources[kLanes];
  uint32_t reading = 0;
  for_lanes(all, [&](int lane) {
    if (read[lane] > static_cast<uint32_t>(bytes))
      fail(warp, lane, at.site, "cp.async: source size larger than the copy");
    if (read[lane] != 0) reading |= 1u << lane;
  });
  warp.active = reading;
  if (reading != 0) find_global(warp, from, bytes, Access::kRead, at, sources);
  warp.active = all;
  for_lanes(all, [&](int lane) {
    const auto offset = static_cast<uint32_t>(places[lane] - warp.block->storage);
    auto& copies = warp.copies[static_cast<size_t>(lane)];
    Copy& copy = copies.emplace_back();
    copy.to = offset;
    copy.bytes = static_cast<uint8_t>(bytes);
    copy.read = static_cast<uint8_t>(read[lane]);
    copy.site = at.site;
    copy.group = warp.groups[static_cast<size_t>(lane)];
    copy.number = warp.block->async != nullptr ? ++warp.block->async->copies : 0;
    copy.from = read[lane] != 0 ? sources[lane] : nullptr;
    std::memset(copy.data, 0, sizeof(copy.data));
    if (copy.from != nullptr) std::memcpy(copy.data, copy.from, copy.read);
    // It may land at any time until the wait: until then the destination is undefined.
    warp.block->shadow->write(offset, static_cast<uint32_t>(bytes), as_access(warp, lane, at.site), true);
  });
  now = {};
}

void Memory::wait_for_copies(Warp& warp, int lane, int pending, const Instruction& at) {
  auto& copies = warp.copies[static_cast<size_t>(lane)];
  const int group = warp.groups[static_cast<size_t>(lane)] - pending;
  size_t landed = 0;
  while (landed < copies.size() && copies[landed].group < group) {
    land(warp, lane, copies[landed++], static_cast<uint16_t>(thread_of(warp, lane)), at.site);
  }
  copies.erase(copies.begin(), copies.begin() + static_cast<int64_t>(landed));
}

void Memory::land(Warp& warp, int lane, const Copy& copy, uint16_t actor, uint16_t waiting_site) {
  if (copy.from != nullptr && std::memcmp(copy.data, copy.from, copy.read) != 0) {
    fail(warp, lane, copy.site,
         "the source of an asynchronous copy changed before its wait (" + site_text(waiting_site) + ")");
  }
  std::memcpy(warp.block->storage + copy.to, copy.data, copy.bytes);
  SharedAccess access = as_access(warp, lane, copy.site);
  access.thread = actor;
  warp.block->shadow->written(copy.to, copy.bytes, access);
}

namespace {

void copy(Warp& warp, const Instruction& i) {
  uint64_t to[kLanes], from[kLanes];
  read_addresses(warp, i, to);
  const auto* source = warp.in<uint64_t>(i.b);
  const auto* size = warp.in<uint32_t>(i.c);
  uint32_t read[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    from[lane] = source[lane] + static_cast<uint64_t>(static_cast<int32_t>(i.target));
    read[lane] = size[lane];
  }
  warp.memory->copy_async(warp, to, from, read, i.bytes, i);
}
void commit(Warp& warp, const Instruction&) {
  for_lanes(warp.active, [&](int lane) { ++warp.groups[static_cast<size_t>(lane)]; });
}
void wait(Warp& warp, const Instruction& i) {
  for_lanes(warp.active,
            [&](int lane) { warp.memory->wait_for_copies(warp, lane, static_cast<int>(i.target), i); });
}
// Includes copies that were not committed to a group.
void wait_all(Warp& warp, const Instruction& i) {
  commit(warp, i);
  for_lanes(warp.active, [&](int lane) { warp.memory->wait_for_copies(warp, lane, 0, i); });
}

}  // namespace

bool decode_copy(Decoder& decoder, const Decoder::Words& words) {
  if (words[0] != "cp" || words[1] != "async") return false;
  Instruction instruction = decoder.begin();
  if (words[2] == "commit_group") {
    instruction.execute = commit;
  } else if (words[2] == "wait_all") {
    instruction.execute = wait_all;
  } else if (words[2] == "wait_group") {
    instruction.execute = wait;
    instruction.target = static_cast<uint32_t>(decoder.operand(0).value);
  } else if (words[2] == "ca" || words[2] == "cg") {
    const bool to_shared = words[3] == "shared" || words[3] == "shared::cta";
    if (!to_shared || words[4] != "global") return false;
    const int64_t bytes = decoder.operand(2).value;
    if (bytes != 16 && (words[2] == "cg" || (bytes != 4 && bytes != 8))) return false;
    instruction.execute = copy;
    instruction.bytes = static_cast<uint8_t>(bytes);
    // The source first, since both operands are addresses.
    set_address(decoder, instruction, decoder.operand(1));
    if (instruction.address != 8) return false;
    instruction.b = instruction.a;
    instruction.target = static_cast<uint32_t>(instruction.offset);
    instruction.offset = 0;
    set_address(decoder, instruction, decoder.operand(0));
    const bool has_size = decoder.statement().operands.size() == 4;
    instruction.c = has_size ? decoder.source(decoder.operand(3), 4) : decoder.constant(bytes, 4);
  } else {
    return false;
  }
  decoder.emit(instruction);
  return true;
}

}  // namespace ptx
