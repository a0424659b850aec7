// Device counters for kernels, kept outside of torch. Why not in a tensor: torch takes whatever stays
// allocated in the private pool of a CUDA graph, and is no output of it, for a leak (check_memory_pool in
// torch/_inductor/cudagraph_trees.py), and its warm-up runs in that pool too.
//
// Kernels that use the same slab of counters must not run concurrently:
//  - Kernels on a stream run one after the other, so outside of captures each stream has one slab.
//  - A graph may be replayed on any stream, concurrently with the stream it was captured on and with other
//    graphs captured there. So every capture has its own slabs, one for each participating stream, as these
//    become branches that may run concurrently. A graph never runs concurrently with itself: CUDA orders its
//    replays.
//
// Kernels reset their counters to zero, so a slab is zeroed only when it is created. In a capture that is a
// node of the graph, one for all kernels that follow: every replay starts with zeros, even if the one before
// was aborted.
//
// Slabs are never freed, because kernels in flight may still use them. One that is too small stays with its
// owner. When a graph and everything instantiated from it are destroyed and have finished, its slabs are
// reused.
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
  unsigned long long id;  // unique for all time; 0: none
  cudaGraph_t graph;
};

// Device, capture, stream.
using Owner = std::tuple<int, unsigned long long, unsigned long long>;

// The mutex is never held during a CUDA call: give_back() runs in a thread of CUDA.
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
  cudaGetLastError();  // clear it, so that it is not reported elsewhere
  throw std::runtime_error(std::string("counters of kernels: ") + what + ": " + cudaGetErrorString(error));
}

// While alive, this thread may allocate during captures, including those of other threads.
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
  // A handle may be reused for a later stream, or mean another stream in each thread.
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
  // Sizes double, so that all slabs that were too small together are no larger than the last.
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

// Must not call CUDA.
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
