// Cases beside those of tests/ptx: what takes more than one warp, or more than one block at the same time.
#pragma once

#include "cases.cuh"

namespace cases {

const Cases& card_cases();

}  // namespace cases
