// Branches, barriers, exit and trap; all but trap are executed by the scheduler.
#include "../machine/warp.h"
#include "decode.h"

namespace ptx {
namespace {

void trap(Warp& warp, const Instruction& instruction) { fail(warp, warp.active, instruction, "trap"); }

}  // namespace

bool decode_control(Decoder& decoder, const Decoder::Words& words) {
  Instruction instruction = decoder.begin();
  const bool is_barrier = (words[0] == "bar" || words[0] == "barrier") && words.has("sync");
  if (words[0] == "bra") {
    instruction.kind = Kind::kBranch;
    instruction.target = decoder.label(decoder.operand(0).name);
  } else if (words[0] == "ret" || words[0] == "exit") {
    instruction.kind = Kind::kExit;
  } else if (words[0] == "trap") {
    instruction.execute = trap;
  } else if (is_barrier && decoder.statement().operands.size() == 1) {
    const Operand& number = decoder.operand(0);
    if (number.kind != Operand::Kind::kImmediate) return false;
    instruction.kind = Kind::kBarrier;
  } else {
    return false;
  }
  decoder.emit(instruction);
  return true;
}

}  // namespace ptx
