// Runs CUDA kernels on the CPU, one fiber per CUDA thread, and looks for what a GPU would let pass: accesses
// to shared or global memory that nothing orders, collectives that lanes miss, copies read too early,
// misaligned or stray accesses. simt_device.h and simt_launch.h are written with the first half of this
// header; tests steer with the second.
//
// A fault is thrown out of run() as std::runtime_error that names the kernel, block, thread and line. The
// emulator stays usable.
//
// It cannot see: in which order mma adds, registers and occupancy, global memory out of bounds (which
// AddressSanitizer can), or global memory overwritten after a read when no kernel has written near it before.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace peft_kernels::simt {

inline constexpr int kLanes = 32;
inline constexpr int kMaxSharedBytes = 227 << 10;  // of a block on any card

// A line of a kernel; as a defaulted parameter, the caller's.
struct Site {
  const char* file = "";
  int line = 0;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
    return {file, line};
  }
};

// ---- For the wrappers; called on fibers ------------------------------------------------------------------

struct Position {
  int thread, block, grid;
};
Position position();

// Check an access to `bytes` at p, tell the race detector, and return where the bytes really are: a kernel's
// address of shared memory is none of ours.
const void* check_read(const void* p, int bytes, Site site);
const void* check_read_constant(const void* p, int bytes, Site site);  // global, not written by this launch
void* check_write(void* p, int bytes, Site site);

void* shared_window(int64_t bytes, Site site);  // the block's shared memory, which must have so many
uint32_t shared_address(const void* p, Site site);
const void* shared_pointer(uint32_t address, Site site);

void copy_async(void* to, const void* from, bool valid, Site site);
void copy_async_commit();
void copy_async_wait(int pending, Site site);

void sync_threads(Site site);
void trap(const char* why, Site site);
// Waits for all lanes of the warp to come here. The last one runs `perform` on what each of them gave.
void collective(const char* name, void* given, void (*perform)(void* const* given), Site site);

uint32_t atomic_add(uint32_t* counter, uint32_t value, Site site);

// ---- For launch() ----------------------------------------------------------------------------------------

struct Launch {
  const char* kernel;  // its typeid's name
  void (*entry)(const void* params);
  const void* params;
  int threads;
  int64_t blocks;
  int shared_bytes;
};
void run(const Launch& launch);
// What a launch may ask for at most.
inline int64_t shared_limit = 163 << 10;

// While there is one, launches are noted in it and do nothing: for what host code alone does.
struct NotedLaunch {
  const char* kernel;  // its typeid's name
  int64_t blocks;
  int threads, shared_bytes;
};
inline std::vector<NotedLaunch>* noted_launches = nullptr;

// ---- For tests -------------------------------------------------------------------------------------------

// Lanes, warps and blocks run in an order that the seed decides, the same in every launch. It starts as
// PEFT_KERNELS_SIMT_SEED, or 0.
void set_seed(uint64_t seed);
// The shared memory that a block can have on the card. It starts as sm_80's.
void set_shared_limit(int64_t bytes);
// Where shared memory begins: at 1024, as on sm_90, where no other place is told.
void set_shared_start(int address);
// How many blocks run at a time; 0: two or three, as the seed says.
void set_resident_blocks(int blocks);

// Warp-wide accesses to shared memory at one line, and what they took. Without conflicts, 32 lanes take one
// wavefront for 4 bytes each, two for 8 and four for 16.
struct BankCount {
  int64_t accesses, wavefronts, conflicts;  // conflicts: wavefronts beyond that
};
std::map<std::string, BankCount> bank_counts();  // by "file.cuh:line"
void reset_bank_counts();

}  // namespace peft_kernels::simt
