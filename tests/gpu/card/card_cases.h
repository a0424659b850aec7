// Cases beside those of tests/gpu/ptx: what takes more than one warp, or more than one block at the same
// time.
#pragma once

#include "cases/cases.cuh"

namespace cases {

const Cases& card_cases();

}  // namespace cases
