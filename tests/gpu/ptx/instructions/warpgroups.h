// Instructions that the four warps of a warpgroup execute together.
#pragma once

#include "../machine/warp.h"

namespace ptx {

inline constexpr int kWarpsPerGroup = 4;

// For handlers of Kind::kMeeting: the warp arrives at the meeting of its warpgroup, which must be at this
// instruction.
Meeting& meet_warpgroup(Warp& warp, const Instruction& instruction);

class Decoder;
void require_sm_90a(Decoder& decoder);

}  // namespace ptx
