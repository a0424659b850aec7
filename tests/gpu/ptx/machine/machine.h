// Runs the PTX that nvcc generates from CUDA kernels on the CPU, and detects what a GPU would let pass:
// unordered accesses to shared or global memory, lanes that miss a collective, copies read too early,
// misaligned or stray accesses.
//
// Faults are thrown as ptx::Fault, whose message names the kernel, block, thread or lanes and the source
// line. The machine stays usable. This is the entry header; the folders, lowest first, each including only
// those before it:
//   text/          parses PTX into modules, kernels and statements
//   machine/       warps, blocks, memory, race detectors, the scheduler
//   instructions/  decodes statements and executes single instructions
//   runtime/       a CUDA runtime on top of the machine
//   cases/         kernels that test_machine.py runs, some with planted faults
// and, on top, bind.cpp for Python.
//
// Not modelled: what ptxas makes of the PTX, caches, clusters of several blocks, and global memory out of
// bounds (which AddressSanitizer detects, if the machine is compiled with it). Compile with
// -ffp-contract=off, and -march=native for speed.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "../text/fault.h"

namespace ptx {

class Module;  // the PTX of one fat binary
struct DeleteModule {
  void operator()(Module* module) const;
};
using ModulePointer = std::unique_ptr<Module, DeleteModule>;

// Reads the declarations; a kernel's body is read when it first runs, or by read_all().
ModulePointer load(std::string_view text);
void read_all(Module& module);  // throws Fault at the first unsupported instruction

// What cudaFuncGetAttributes returns. Throws Fault if the module has no such kernel.
struct Attributes {
  int max_threads;        // of a block: .maxntid
  int64_t static_shared;  // bytes
  int target;             // 80 for sm_80
};
std::vector<std::string> entries(const Module& module);
Attributes attributes(Module& module, const std::string& entry);

// Runs a kernel to completion in the calling thread, one at a time. `arguments` as for cudaLaunchKernel.
struct Launch {
  unsigned blocks, threads;
  int64_t shared_bytes;  // dynamic
  const void* const* arguments;
  unsigned blocks_y = 1, blocks_z = 1;  // `blocks` is the first dimension's; blocks of threads have one
  // Whether threads may write the same value to a place in shared memory without a barrier in between.
  // Triton's code does if it has more threads than elements.
  bool same_writes = false;
};
void run(Module& module, const std::string& entry, const Launch& launch);

struct Options {
  // The seed decides the order of warps and blocks, which is the same in every launch.
  uint32_t seed = 0;
  int resident_blocks = 0;  // concurrent blocks, at most 4; 0: two or three, by the seed
  // Truncates sums of matrix instructions as tensor cores do (see matrices.cpp), instead of rounding them to
  // nearest.
  bool truncate_sums = false;
  // Perturbs the results of .approx instructions and div.full, which are otherwise correctly rounded, by up
  // to one unit in the last place (ex2 and div: two), by a hash of the operands.
  bool perturb_approximations = false;
  // Unwritten shared memory is NaN; this makes reading it a fault. Off by default: a kernel may read rows
  // that it discards.
  bool report_unwritten = false;
  int64_t shared_limit = 163 << 10;     // of a block on the card; starts as sm_80's
  int64_t first_shared_address = 1024;  // where a block's shared memory begins, as on sm_90
};
// PEFT_KERNELS_PTX_SEED, if set, is the seed at the start.
Options& options();

// Warp-wide accesses to shared memory at one line, and their wavefronts. Without conflicts, 32 lanes need one
// wavefront for 4 bytes each, two for 8 and four for 16.
struct BankCount {
  int64_t accesses, wavefronts, conflicts;  // conflicts: wavefronts beyond that
};
std::map<std::string, BankCount> bank_counts();  // by "file.cuh:line", of all launches
void reset_bank_counts();

// How often each instruction of the kernels read so far was executed, by any warp.
struct Executed {
  std::string entry, line, text;  // line: "file.cuh:line"; text: the instruction
  uint64_t times;
};
std::vector<Executed> executed(const Module& module);

}  // namespace ptx
