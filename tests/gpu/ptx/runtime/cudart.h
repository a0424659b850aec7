// A stand-in for the CUDA runtime (libcudart), for programs that nvcc compiled with their kernels as PTX and
// linked with -cudart none: a launch runs the kernel on the CPU, to its end, and device memory is the host's.
// It has the functions that this project's kernels and tests call; what is declared here is for tests.
//
// PEFT_KERNELS_PTX_ARCH (80) and PEFT_KERNELS_PTX_TRUNCATE (0) say what it starts with.
//
// A fault of a kernel is thrown out of the launch as ptx::Fault. What CUDA refuses is refused with its
// errors.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "../machine/machine.h"

namespace peft_kernels::cudart {

// The card: of the PTX in a fat binary, that of the newest architecture runs which is no newer than the card.
void set_card(int compute_capability, int64_t shared_bytes, int64_t reserved_bytes);
// Runs what `edit` makes of the PTX of a fat binary; null: the PTX as it is.
void set_edit(std::function<std::string(std::string)> edit);
struct Note {
  std::string kernel;
  unsigned blocks, threads;
  int64_t shared_bytes;
};
// From now on launches are noted there and do nothing; null: they run.
void note_launches(std::vector<Note>* notes);
// As if a kernel had failed: every call returns this error until it is 0 again.
void set_sticky_error(int error);

// How often the instructions of the kernels of a fat binary were executed, of those that ran, and the others.
struct Executed {
  int binary, architecture;
  std::vector<ptx::Executed> instructions;
  std::vector<std::string> never_run;
};
std::vector<Executed> executed();

}  // namespace peft_kernels::cudart
