// Why not a tensor: what lives on in the private pool of a CUDA graph, and is no output of it, torch takes
// for a leak (check_memory_pool in torch/_inductor/cudagraph_trees.py), and its warm-up runs in that pool
// too.
//
// Who has a slab of counters may not run beside another one who has it:
//  - Kernels on a stream run one after the other, so outside captures a stream has one slab.
//  - A graph may be replayed on any stream, beside the stream that it was captured on and beside other graphs
//    captured there. So every capture has slabs of its own, one for each of the streams that take part, for
//    these become branches that may run at once. A graph never runs beside itself: CUDA orders its replays.
//
// Kernels leave their counters zero, so a slab is zeroed when it is made. In a capture that is a node of the
// graph, one for all kernels that follow: every replay begins with zeros, whatever became of the one before.
//
// Slabs are never freed, for what has been started may still use them. One that is too small is left to those
// that have it. A graph gives its slabs back when it and all that was instantiated from it are destroyed, and
// have run to their ends; they serve others then.
#include "counters.h"

#include <algorithm>
#include <map>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

namespace peft_kernels::cuda {
namespace {

constexpr int64_t kLeastCounters = 4096;

struct Slab {
  uint32_t* start;
  int64_t count;
};

struct Capture {
  unsigned long long id;  // of no other capture, ever; 0: none
  cudaGraph_t graph;
};

// Device, capture, stream.
using Owner = std::tuple<int, unsigned long long, unsigned long long>;

// The mutex is never held during a call of CUDA: give_back() is called in a thread of CUDA's.
struct Slabs {
  std::mutex mutex;
  std::map<Owner, Slab> in_use;
  std::map<int, std::vector<Slab>> unused;  // by device
};
// Never destroyed: graphs may be destroyed after static objects.
Slabs& slabs() {
  static Slabs& all = *new Slabs;
  return all;
}

void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  cudaGetLastError();  // nobody else is to find it
  throw std::runtime_error(std::string("counters of kernels: ") + what + ": " + cudaGetErrorString(error));
}

// While it lives, this thread may allocate during captures, those of other threads too.
class AllowedInCaptures {
 public:
  AllowedInCaptures() { check(cudaThreadExchangeStreamCaptureMode(&mode_), "capture mode"); }
  ~AllowedInCaptures() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  AllowedInCaptures(const AllowedInCaptures&) = delete;
  AllowedInCaptures& operator=(const AllowedInCaptures&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

Capture capture_of(cudaStream_t stream) {
  cudaStreamCaptureStatus status{};
  Capture capture{};
#if CUDART_VERSION >= 13000
  check(cudaStreamGetCaptureInfo(stream, &status, &capture.id, &capture.graph, nullptr, nullptr, nullptr),
        "capture");
#else
  check(cudaStreamGetCaptureInfo_v2(stream, &status, &capture.id, &capture.graph, nullptr, nullptr),
        "capture");
#endif
  return status == cudaStreamCaptureStatusActive ? capture : Capture{};
}

Owner owner_of(int device, cudaStream_t stream, const Capture& capture) {
  // A handle may be that of a later stream one day, or of another one in each thread.
  auto id = reinterpret_cast<unsigned long long>(stream);
  if (capture.id == 0) check(cudaStreamGetId(stream, &id), "stream");
  return {device, capture.id, id};
}

Slab take(int device, int64_t count) {
  {
    const std::lock_guard<std::mutex> lock(slabs().mutex);
    std::vector<Slab>& unused = slabs().unused[device];
    const auto found =
        std::find_if(unused.begin(), unused.end(), [&](const Slab& each) { return each.count >= count; });
    if (found != unused.end()) {
      const Slab slab = *found;
      unused.erase(found);
      return slab;
    }
  }
  // By doubling, so that all slabs that were too small are together no larger than the last.
  Slab slab{nullptr, kLeastCounters};
  while (slab.count < count) slab.count *= 2;
  const AllowedInCaptures allowed;
  check(cudaMalloc(reinterpret_cast<void**>(&slab.start), static_cast<size_t>(slab.count) * sizeof(uint32_t)),
        "memory");
  return slab;
}

struct Loan {
  Owner owner;
  Slab slab;
};

// May not call CUDA.
void give_back(void* ended) {
  const std::unique_ptr<Loan> loan(static_cast<Loan*>(ended));
  const std::lock_guard<std::mutex> lock(slabs().mutex);
  const auto found = slabs().in_use.find(loan->owner);
  if (found != slabs().in_use.end() && found->second.start == loan->slab.start) slabs().in_use.erase(found);
  slabs().unused[std::get<0>(loan->owner)].push_back(loan->slab);
}

void lend(const Slab& slab, const Owner& owner, cudaGraph_t graph) {
  auto loan = std::make_unique<Loan>(Loan{owner, slab});
  cudaUserObject_t object{};
  check(cudaUserObjectCreate(&object, loan.get(), give_back, 1, cudaUserObjectNoDestructorSync), "loan");
  loan.release();
  check(cudaGraphRetainUserObject(graph, object, 1, cudaGraphUserObjectMove), "loan to a graph");
}

}  // namespace

uint32_t* counters_on(int device, cudaStream_t stream, int64_t count) {
  const Capture capture = capture_of(stream);
  const Owner owner = owner_of(device, stream, capture);
  {
    const std::lock_guard<std::mutex> lock(slabs().mutex);
    const auto found = slabs().in_use.find(owner);
    if (found != slabs().in_use.end() && found->second.count >= count) return found->second.start;
  }
  const Slab slab = take(device, count);
  if (capture.id != 0) lend(slab, owner, capture.graph);
  check(cudaMemsetAsync(slab.start, 0, static_cast<size_t>(slab.count) * sizeof(uint32_t), stream), "zeros");
  const std::lock_guard<std::mutex> lock(slabs().mutex);
  slabs().in_use[owner] = slab;
  return slab.start;
}

}  // namespace peft_kernels::cuda
