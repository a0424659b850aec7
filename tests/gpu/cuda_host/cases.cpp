// `cases NAME` runs one case of the host code of kernel launches and prints its error, or "clean".
#include <cstdio>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>

#include "core/counters.h"
#include "core/kernels.h"
#include "core/stream.h"
#include "fake_runtime.h"

namespace peft_kernels::cuda {
namespace {

using fake::Capture;
using fake::Graph;
using fake::state;

void expect(bool holds, const std::string& what) {
  if (!holds) throw std::runtime_error("expected: " + what);
}
void expect_error(const std::function<void()>& run, const std::string& words) {
  try {
    run();
  } catch (const std::runtime_error& error) {
    if (std::string(error.what()) == words) return;
    throw std::runtime_error("expected: " + words + "\ngot: " + error.what());
  }
  throw std::runtime_error("expected an error: " + words);
}

uint32_t* counters(fake::Stream& stream, int64_t count = 100) {
  return counters_on(state.device, fake::handle(stream), count);
}

// A kernel that counts arrivals, in two halves, so that others can run in between.
class Kernel {
 public:
  explicit Kernel(uint32_t* counter) : counter_(counter) {}
  void begin() { expect(counter_[0]++ == 0, "a counter of zero when a kernel begins"); }
  void end() {
    expect(counter_[0] == 1, "no other kernel to have counted");
    counter_[0] = 0;
  }

 private:
  uint32_t* counter_;
};

void run(const Graph& graph) {
  for (const auto& node : graph.nodes) node();
}

struct Captured {
  std::unique_ptr<Graph> graph;
  Kernel kernel;
};
Captured captured(fake::Stream& stream, int64_t count = 100) {
  Capture capture({&stream});
  const Kernel kernel(counters(stream, count));
  return {std::move(const_cast<std::unique_ptr<Graph>&>(capture.graph)), kernel};
}

// ---- Counters -----------------------------------------------------------------------------------------

void same_again() {
  fake::Stream stream{1};
  uint32_t* first = counters(stream);
  for (int i = 0; i < 100; ++i) expect(first[i] == 0, "zeros");
  state.calls.clear();
  expect(counters(stream) == first && counters(stream, 7) == first, "the same counters for a stream");
  for (const std::string& call : state.calls) {
    expect(call == "cudaStreamGetCaptureInfo" || call == "cudaStreamGetId", "only queries, not: " + call);
  }
}

void owners() {
  fake::Stream a{1}, b{2};
  uint32_t* of_a = counters(a);
  expect(counters(b) != of_a, "each stream to have its own");
  a.id = 3;
  expect(counters(a) != of_a, "a later stream with the same handle to have its own");
  a.id = 1;
  state.device = 1;
  expect(counters(a) != of_a, "each device to have its own");
}

void growth() {
  fake::Stream stream{1};
  Kernel running(counters(stream));
  running.begin();
  uint32_t* larger = counters(stream, 5000);
  expect(larger[4999] == 0 && counters(stream, 100) == larger, "enough zeros, for smaller kernels as well");
  Kernel next(larger);
  next.begin();
  running.end();
  next.end();
}

void growth_in_a_capture() {
  fake::Stream stream{1};
  Capture capture({&stream});
  uint32_t *first = counters(stream), *larger = counters(stream, 5000);
  expect(first != larger && counters(stream) == larger, "a larger slab");
  expect(capture.graph->nodes.size() == 2 && capture.graph->objects.size() == 2,
         "both to be owned by the graph");
}

void captures_allocate() {
  fake::Stream stream{1}, elsewhere{2};
  const Capture capture({&stream});
  counters(stream);
  counters(elsewhere);  // while another stream is captured
  expect(state.mode == cudaStreamCaptureModeGlobal, "the thread's capture mode to be restored");
}

void zeroed_once_in_a_graph() {
  fake::Stream stream{1};
  const Capture capture({&stream});
  uint32_t* first = counters(stream);
  for (int i = 0; i < 10; ++i) expect(counters(stream) == first, "the same counters in the whole capture");
  expect(capture.graph->nodes.size() == 1, "one node that zeroes them");
}

void graph_beside_its_stream() {
  fake::Stream stream{1};
  Kernel eager(counters(stream));
  Captured graph = captured(stream);
  for (int i = 0; i < 3; ++i) {
    eager.begin();
    run(*graph.graph);
    graph.kernel.begin();
    eager.end();
    graph.kernel.end();
  }
}

void two_graphs_of_a_stream() {
  fake::Stream stream{1};
  Captured a = captured(stream), b = captured(stream);
  for (int i = 0; i < 3; ++i) {
    run(*a.graph);
    a.kernel.begin();
    run(*b.graph);
    b.kernel.begin();
    a.kernel.end();
    b.kernel.end();
  }
}

void branches_of_a_graph() {
  fake::Stream a{1}, b{2};
  const Capture capture({&a, &b});
  Kernel first(counters(a)), second(counters(b));
  run(*capture.graph);
  first.begin();
  second.begin();
  first.end();
  second.end();
}

void replay_after_an_aborted_one() {
  fake::Stream stream{1};
  Captured graph = captured(stream);
  run(*graph.graph);
  graph.kernel.begin();
  run(*graph.graph);
  graph.kernel.begin();
  graph.kernel.end();
}

void graphs_give_back() {
  fake::Stream stream{1};
  Captured first = captured(stream);
  const auto executable = first.graph->objects;  // what it was instantiated with
  first.graph.reset();
  Captured second = captured(stream);
  expect(fake::calls("cudaMalloc") == 2, "an instantiated graph to keep its slab");
  run(*second.graph);
  second.kernel.begin();
  first.kernel = Kernel(nullptr);
  second.kernel.end();
}

void many_graphs() {
  fake::Stream stream{1};
  for (int i = 0; i < 100; ++i) {
    Captured graph = captured(stream);
    run(*graph.graph);
    graph.kernel.begin();
  }
  expect(fake::calls("cudaMalloc") == 1, "slabs of destroyed graphs to be reused");
  Kernel eager(counters(stream));
  eager.begin();  // on zeros, although the last graph was aborted
  state.device = 1;
  captured(stream);
  state.device = 0;
  captured(stream);
  expect(fake::calls("cudaMalloc") == 3, "slabs to stay on their devices");
}

void no_memory() {
  fake::Stream stream{1};
  state.fails = "cudaMalloc";
  state.error = cudaErrorMemoryAllocation;
  expect_error([&] { counters(stream); }, "counters of kernels: memory: an error's description");
  expect(state.last_error == cudaSuccess, "the error to be cleared");
  expect(state.mode == cudaStreamCaptureModeGlobal, "the thread's capture mode to be restored");
  state.fails.clear();
  counters(stream);
}

// ---- Cards --------------------------------------------------------------------------------------------

void card() {
  const Card card = card_of(0);
  expect(card.compute_capability == 86 && card.sms == 82, "the properties that the runtime reports");
  expect(card.shared_bytes == 227 << 10 && card.reserved_bytes == 2048, "its shared memory");
}

void card_query_fails() {
  state.fails = "cudaDeviceGetAttribute";
  state.error = cudaErrorInvalidValue;
  expect_error([] { card_of(3); }, "cuda:3: cannot query the compute capability: an error's description");
  expect(state.last_error == cudaSuccess, "the error to be cleared");
}

// ---- Starting -----------------------------------------------------------------------------------------

struct Gemm {};
int entry;

KernelEntry kernel{&entry, typeid(Gemm).name(), 256};
const std::string kName = "peft_kernels::cuda::(anonymous namespace)::Gemm: launch failed, with ";

void begin(int64_t blocks, int shared_bytes = 0) {
  start_blocks(kernel, nullptr, blocks, shared_bytes, nullptr);
}

void starts() {
  begin(7, 1000);
  begin(0x7fffffff);
  expect(state.launches.size() == 2, "two launches");
  const fake::Launch first = state.launches[0];
  expect(first.entry == &entry && first.blocks == 7 && first.threads == 256 && first.shared_bytes == 1000,
         "the launch configuration");
  expect(fake::calls("cudaFuncSetAttribute") == 0, "no attribute for little shared memory");
}

void grid_limits() {
  const std::string rest =
      " blocks of 256 threads and 0 bytes of shared memory each: expected at most 2147483647 blocks";
  expect_error([] { begin(int64_t{1} << 31); }, kName + "2147483648" + rest);
  expect_error([] { begin(-1); }, kName + "-1" + rest);
  expect(state.launches.empty(), "no launch");
}

void own_error() {
  state.fails = "cudaLaunchKernel";
  state.error = cudaErrorInvalidValue;
  expect_error([] { begin(5, 64); },
               kName +
                   "5 blocks of 256 threads and 64 bytes of shared memory each: an error's description "
                   "(cudaErrorInvalidValue)");
  expect(state.last_error == cudaSuccess, "the error to be cleared");
}

void error_of_a_call_before() {
  state.last_error = cudaErrorInvalidValue;
  expect_error(
      [] { begin(5); },
      kName +
          "5 blocks of 256 threads and 0 bytes of shared memory each: an earlier CUDA call left this "
          "error pending: an error's description (cudaErrorInvalidValue)");
  expect(state.launches.empty() && state.last_error == cudaSuccess, "no launch, and a cleared error");
  state.last_error = cudaErrorNotReady;
  begin(5);
  expect(state.launches.size() == 1, "a launch: cudaErrorNotReady is no error");
}

void error_of_a_kernel_before() {
  state.fails = "cudaLaunchKernel";
  state.error = cudaErrorIllegalAddress;
  expect_error([] { begin(5); },
               kName +
                   "5 blocks of 256 threads and 0 bytes of shared memory each: an earlier kernel failed: "
                   "an illegal memory access (an error's name)");
}

void large_shared() {
  for (int device : {0, 1, 0, 1, 70, 70}) {
    state.device = device;
    begin(5, 100 << 10);
  }
  expect(state.launches.size() == 6, "six launches");
  // Above 64 devices the opt-in is not cached.
  expect(fake::calls("cudaFuncSetAttribute") == 4, "one opt-in to large shared memory per device");
  state.fails = "cudaFuncSetAttribute";
  state.device = 2;
  expect_error([] { begin(5, 100 << 10); },
               kName +
                   "5 blocks of 256 threads and 102400 bytes of shared memory each: an error's description "
                   "(an error's name)");
  state.fails.clear();
  begin(5, 100 << 10);
  expect(fake::calls("cudaFuncSetAttribute") == 6, "another opt-in after a failure");
}

const std::map<std::string, void (*)()> kCases{
    {"same_again", same_again},
    {"owners", owners},
    {"growth", growth},
    {"growth_in_a_capture", growth_in_a_capture},
    {"captures_allocate", captures_allocate},
    {"zeroed_once_in_a_graph", zeroed_once_in_a_graph},
    {"graph_beside_its_stream", graph_beside_its_stream},
    {"two_graphs_of_a_stream", two_graphs_of_a_stream},
    {"branches_of_a_graph", branches_of_a_graph},
    {"replay_after_an_aborted_one", replay_after_an_aborted_one},
    {"graphs_give_back", graphs_give_back},
    {"many_graphs", many_graphs},
    {"no_memory", no_memory},
    {"card", card},
    {"card_query_fails", card_query_fails},
    {"starts", starts},
    {"grid_limits", grid_limits},
    {"own_error", own_error},
    {"error_of_a_call_before", error_of_a_call_before},
    {"error_of_a_kernel_before", error_of_a_kernel_before},
    {"large_shared", large_shared},
};

}  // namespace
}  // namespace peft_kernels::cuda

int main(int count, char** arguments) {
  const auto found = peft_kernels::cuda::kCases.find(count == 2 ? arguments[1] : "");
  if (found == peft_kernels::cuda::kCases.end()) return 2;
  try {
    found->second();
  } catch (const std::exception& error) {
    std::puts(error.what());
    return 0;
  }
  std::puts("clean");
  return 0;
}
