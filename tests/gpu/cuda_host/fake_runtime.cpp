#include "fake_runtime.h"

#include <algorithm>
#include <cstring>
#include <map>

namespace fake {

State state;

namespace {

cudaError_t outcome(const char* function, bool allowed = true) {
  state.calls.emplace_back(function);
  cudaError_t error = allowed ? cudaSuccess : cudaErrorStreamCaptureUnsupported;
  if (state.fails == function) error = state.error;
  if (error != cudaSuccess) state.last_error = error;
  return error;
}

Stream& stream_of(cudaStream_t handle) { return *reinterpret_cast<Stream*>(handle); }

}  // namespace

cudaStream_t handle(Stream& stream) { return reinterpret_cast<cudaStream_t>(&stream); }

Capture::Capture(const std::vector<Stream*>& streams) : streams_(streams) {
  static unsigned long long captures = 0;
  ++captures;
  ++state.captures;
  for (Stream* stream : streams_) {
    stream->capture = captures;
    stream->graph = graph.get();
  }
}
Capture::~Capture() {
  --state.captures;
  for (Stream* stream : streams_) {
    stream->capture = 0;
    stream->graph = nullptr;
  }
}

int64_t calls(const std::string& function) {
  return std::count(state.calls.begin(), state.calls.end(), function);
}

}  // namespace fake

using fake::outcome;
using fake::state;

extern "C" {

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorIllegalAddress ? "an illegal memory access" : "an error's description";
}
const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorInvalidValue ? "cudaErrorInvalidValue" : "an error's name";
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = state.last_error;
  state.last_error = cudaSuccess;
  return error;
}

cudaError_t cudaGetDevice(int* device) {
  *device = state.device;
  return outcome("cudaGetDevice");
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  static const std::map<cudaDeviceAttr, int> values{{cudaDevAttrComputeCapabilityMajor, 8},
                                                    {cudaDevAttrComputeCapabilityMinor, 6},
                                                    {cudaDevAttrMultiProcessorCount, 82},
                                                    {cudaDevAttrMaxSharedMemoryPerBlockOptin, 227 << 10},
                                                    {cudaDevAttrReservedSharedMemoryPerBlock, 2048}};
  *value = values.at(attribute);
  return outcome("cudaDeviceGetAttribute");
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) {
  return outcome("cudaFuncSetAttribute");
}

cudaError_t cudaLaunchKernel(const void* entry, dim3 blocks, dim3 threads, void**, size_t shared_bytes,
                             cudaStream_t) {
  const cudaError_t error = outcome("cudaLaunchKernel");
  if (error == cudaSuccess) state.launches.push_back({entry, blocks.x, threads.x, shared_bytes});
  return error;
}

cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, state.mode);
  return outcome("cudaThreadExchangeStreamCaptureMode");
}

cudaError_t cudaMalloc(void** start, size_t bytes) {
  const cudaError_t error =
      outcome("cudaMalloc", state.captures == 0 || state.mode == cudaStreamCaptureModeRelaxed);
  if (error == cudaSuccess) *start = state.memory.emplace_back(bytes / 4, 0xdeadbeef).data();
  return error;
}

cudaError_t cudaMemsetAsync(void* start, int value, size_t bytes, cudaStream_t stream) {
  const auto run = [=] { std::memset(start, value, bytes); };
  fake::Graph* graph = fake::stream_of(stream).graph;
  if (graph == nullptr) {
    run();
  } else {
    graph->nodes.emplace_back(run);
  }
  return outcome("cudaMemsetAsync");
}

cudaError_t cudaStreamGetId(cudaStream_t stream, unsigned long long* id) {
  *id = fake::stream_of(stream).id;
  return outcome("cudaStreamGetId", fake::stream_of(stream).capture == 0);
}

#if CUDART_VERSION >= 13000
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                     unsigned long long* id, cudaGraph_t* graph, const cudaGraphNode_t**,
                                     const cudaGraphEdgeData**, size_t*) {
#else
cudaError_t cudaStreamGetCaptureInfo_v2(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                        unsigned long long* id, cudaGraph_t* graph, const cudaGraphNode_t**,
                                        size_t*) {
#endif
  const fake::Stream& of = fake::stream_of(stream);
  *status = of.capture == 0 ? cudaStreamCaptureStatusNone : cudaStreamCaptureStatusActive;
  *id = of.capture;
  *graph = reinterpret_cast<cudaGraph_t>(of.graph);
  return outcome("cudaStreamGetCaptureInfo");
}

cudaError_t cudaUserObjectCreate(cudaUserObject_t* object, void* data, cudaHostFn_t destroy, unsigned count,
                                 unsigned flags) {
  const bool as_meant = count == 1 && flags == cudaUserObjectNoDestructorSync;
  *object = reinterpret_cast<cudaUserObject_t>(new std::shared_ptr<void>(data, destroy));
  return outcome("cudaUserObjectCreate", as_meant);
}
cudaError_t cudaGraphRetainUserObject(cudaGraph_t graph, cudaUserObject_t object, unsigned count,
                                      unsigned flags) {
  const bool as_meant = count == 1 && flags == cudaGraphUserObjectMove;
  const std::unique_ptr<std::shared_ptr<void>> given(reinterpret_cast<std::shared_ptr<void>*>(object));
  reinterpret_cast<fake::Graph*>(graph)->objects.push_back(*given);
  return outcome("cudaGraphRetainUserObject", as_meant);
}

}  // extern "C"
