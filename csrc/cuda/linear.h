// The kernels that plan_linear() and plan_linear_dx() choose from.
#pragma once

#include "linear_plan.h"

namespace peft_kernels::cuda {

Status start_linear(const SmallShape& shape, const LinearParams& params, const Cut& cut, uint32_t* counters,
                    void* workspace, Stream stream);
Status start_linear(const TileShape& shape, const LinearParams& params, const Cut& cut, uint32_t* counters,
                    void* workspace, Stream stream);
Status start_linear_dx(const DxShape& shape, const LinearParams& params, const Cut& cut, uint32_t* counters,
                       void* workspace, Stream stream);

}  // namespace peft_kernels::cuda
