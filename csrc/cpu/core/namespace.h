#pragma once

#include "../../common/namespace.h"

#define PEFT_KERNELS_NAMESPACE PEFT_KERNELS_JOIN(PEFT_KERNELS_PACKAGE, _cpu)
