// Runs the PTX that nvcc makes of CUDA kernels on the CPU, and looks for what a GPU would let pass: accesses
// to shared or global memory that nothing orders, lanes that miss a collective, copies read too early,
// misaligned or stray accesses.
//
// A fault is thrown as ptx::Fault, whose message names the kernel, block, thread or lanes and the line of the
// source. The machine stays usable.
//
// It cannot see: what ptxas makes of the PTX, caches, global memory out of bounds (which AddressSanitizer
// can, if the machine is compiled with it). Compile it with -ffp-contract=off, and -march=native for speed.
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

// Reads what is outside of the kernels' bodies; those are read when they are first run, or by read_all().
ModulePointer load(std::string_view text);
void read_all(Module& module);  // throws Fault at the first instruction that the machine does not know

// What cudaFuncGetAttributes asks for. Throws Fault if the module has no such kernel.
struct Attributes {
  int max_threads;        // of a block: .maxntid
  int64_t static_shared;  // bytes
  int target;             // 80 for sm_80
};
std::vector<std::string> entries(const Module& module);
Attributes attributes(Module& module, const std::string& entry);

// Runs a kernel to its end, in the calling thread; one at a time. `arguments` as cudaLaunchKernel has them.
struct Launch {
  unsigned blocks, threads;
  int64_t shared_bytes;  // dynamic
  const void* const* arguments;
  unsigned blocks_y = 1, blocks_z = 1;  // `blocks` is the first dimension's; blocks of threads have one
  // Whether threads may write to shared memory, with no barrier between, what another wrote there, if it is
  // the same. Triton's code does where it has more threads than numbers.
  bool same_writes = false;
};
void run(Module& module, const std::string& entry, const Launch& launch);

struct Options {
  // Warps and blocks run in an order that the seed decides, the same in every launch.
  uint32_t seed = 0;
  int resident_blocks = 0;  // how many run at a time, 4 at most; 0: two or three, as the seed says
  // Sums of matrix instructions as tensor cores make them (see mma.cpp), not rounded to the nearest.
  bool truncate_sums = false;
  // Results of the .approx instructions and of div.full, exact but for rounding, are moved by up to a unit in
  // the last place, those of ex2 and div by up to two, as a hash of the operand says.
  bool perturb_approximations = false;
  // Shared memory that nobody wrote is NaN; whether to read it is a fault. A kernel may, of rows that it
  // throws away.
  bool report_unwritten = false;
  int64_t shared_limit = 163 << 10;     // of a block on the card; starts as sm_80's
  int64_t first_shared_address = 1024;  // where a block's shared memory begins, as on sm_90
};
// PEFT_KERNELS_PTX_SEED, if set, is the seed at the start.
Options& options();

// Warp-wide accesses to shared memory at one line, and what they took. Without conflicts, 32 lanes take one
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
