// A replacement of the CUDA runtime (libcudart) for programs that nvcc compiled with embedded PTX and linked
// with -cudart none: a launch runs the kernel on the CPU to completion, and device memory is host memory. It
// has the functions that this project's kernels and tests call; those declared here are for tests.
//
// PEFT_KERNELS_PTX_ARCH (80) and PEFT_KERNELS_PTX_TRUNCATE (0) set the initial card and rounding.
//
// A fault of a kernel is thrown out of the launch as ptx::Fault. Invalid calls return CUDA's errors.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "../machine/machine.h"

namespace peft_kernels::cudart {

// Sets the card. Of the PTX in a fat binary, that of the newest architecture not newer than the card is run;
// that of sm_90a only on 9.0.
void set_card(int compute_capability, int64_t shared_bytes, int64_t reserved_bytes);
// Applies `edit` to the PTX of fat binaries before running it; null: none.
void set_edit(std::function<std::string(std::string)> edit);
struct Note {
  std::string kernel;
  unsigned blocks, threads;
  int64_t shared_bytes;
};
// Records launches instead of running them; null: runs them.
void note_launches(std::vector<Note>* notes);
// Simulates a failed kernel: every call returns this error until it is reset to 0.
void set_sticky_error(int error);

// Execution counts of the instructions of a fat binary's kernels, and the kernels that never ran.
struct Executed {
  int binary, architecture;
  std::vector<ptx::Executed> instructions;
  std::vector<std::string> never_run;
};
std::vector<Executed> executed();

}  // namespace peft_kernels::cudart
