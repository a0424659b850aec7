// A fake CUDA runtime without a device: the functions that card.cpp, counters.cpp and launch.cpp call. Work
// on a stream runs at once; during a capture it becomes a node of a graph.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <memory>
#include <set>
#include <string>
#include <vector>

namespace fake {

struct Graph {
  std::vector<std::function<void()>> nodes;
  std::vector<std::shared_ptr<void>> objects;  // retained user objects
};

struct Stream {
  unsigned long long id;
  unsigned long long capture = 0;
  Graph* graph = nullptr;
};

struct Launch {
  const void* entry;
  unsigned blocks, threads;
  size_t shared_bytes;
};

struct State {
  int device = 0;
  cudaStreamCaptureMode mode = cudaStreamCaptureModeGlobal;
  int captures = 0;  // active ones, in any thread
  cudaError_t last_error = cudaSuccess;
  std::string fails;  // the function that returns `error`
  cudaError_t error = cudaErrorUnknown;
  std::vector<std::string> calls;
  std::vector<std::vector<uint32_t>> memory;  // all allocations, filled with nonzero words
  std::vector<Launch> launches;
};
extern State state;

cudaStream_t handle(Stream& stream);
// Captures streams into a new graph during its lifetime.
class Capture {
 public:
  explicit Capture(const std::vector<Stream*>& streams);
  ~Capture();

  const std::unique_ptr<Graph> graph = std::make_unique<Graph>();

 private:
  std::vector<Stream*> streams_;
};

int64_t calls(const std::string& function);

}  // namespace fake
