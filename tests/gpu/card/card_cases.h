// Cases in addition to those of tests/gpu/ptx: more than one warp, or concurrent blocks.
#pragma once

#include "cases/cases.cuh"

namespace cases {

const Cases& card_cases();

}  // namespace cases
