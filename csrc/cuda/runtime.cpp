#include "runtime.h"

#include <map>
#include <mutex>
#include <tuple>
#include <vector>

#ifdef PEFT_KERNELS_PTX
#  include "cudart.h"
#endif

#ifndef PEFT_KERNELS_ON_CPU
#  include <c10/cuda/CUDAException.h>
#  include <c10/cuda/CUDAFunctions.h>
#  include <c10/cuda/CUDAStream.h>
#endif

namespace peft_kernels {

#ifdef PEFT_KERNELS_ON_CPU

void check_device(const Tensor& t, const char* name) {
  TORCH_CHECK(t.device().is_cpu(), name, ": expected a CPU tensor, got one on ", t.device());
}

namespace cuda {
namespace {

// One user after another: the emulator runs a kernel to its end before launch() returns, in the calling
// thread.
struct CountersKey {
  bool operator<(const CountersKey&) const { return false; }
};
CountersKey counters_key() { return {}; }

Card& card() {
  static Card card{80, 4, 163 << 10};
  return card;
}

}  // namespace

OnDeviceOf::OnDeviceOf(const Tensor& t, const char* name) { check_device(t, name); }

Stream current_stream() { return {}; }

const Card& current_card() { return card(); }

void set_card(const Card& new_card) {
  card() = new_card;
#  ifdef PEFT_KERNELS_SIMT
  simt::set_shared_limit(new_card.shared_bytes);
#  else
  cudart::set_card(new_card.compute_capability, new_card.shared_bytes);
#  endif
}

#else

void check_device(const Tensor& t, const char* name) {
  TORCH_CHECK(t.is_cuda() && t.device().index() == c10::cuda::current_device(), name,
              ": expected a tensor on cuda:", static_cast<int>(c10::cuda::current_device()),
              " like the first one, got one on ", t.device());
}

namespace cuda {
namespace {

// Device, stream, and the capture of a CUDA graph that the stream takes part in, or 0.
using CountersKey = std::tuple<int, cudaStream_t, unsigned long long>;

CountersKey counters_key() {
  cudaStreamCaptureStatus status{};
  unsigned long long capture = 0;
  C10_CUDA_CHECK(cudaStreamGetCaptureInfo(current_stream(), &status, &capture));
  if (status == cudaStreamCaptureStatusNone) capture = 0;
  return {c10::cuda::current_device(), current_stream(), capture};
}

int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, device));
  return value;
}

}  // namespace

OnDeviceOf::OnDeviceOf(const Tensor& t, const char* name) {
  TORCH_CHECK(t.is_cuda(), name, ": expected a CUDA tensor, got one on ", t.device());
  guard_.set_index(t.device().index());
}

Stream current_stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

const Card& current_card() {
  thread_local std::map<int, Card> cards;
  const int device = c10::cuda::current_device();
  auto found = cards.find(device);
  if (found == cards.end()) {
    const int major = attribute(cudaDevAttrComputeCapabilityMajor, device),
              minor = attribute(cudaDevAttrComputeCapabilityMinor, device);
    const Card card{10 * major + minor, attribute(cudaDevAttrMultiProcessorCount, device),
                    attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)};
    found = cards.emplace(device, card).first;
  }
  return found->second;
}

#endif

namespace {

#ifdef PEFT_KERNELS_ON_CPU
constexpr auto kDevice = at::kCPU;
#else
constexpr auto kDevice = at::kCUDA;
#endif

struct AllCounters {
  std::mutex mutex;
  std::map<CountersKey, Tensor> tensors;
};

}  // namespace

void* CallContext::workspace(int64_t bytes) {
  if (bytes == 0) return nullptr;
  workspace_ = at::empty({bytes}, at::TensorOptions(kDevice).dtype(at::kByte));
  return workspace_.mutable_data_ptr();
}

uint32_t* CallContext::counters(int64_t count) {
  if (count == 0) return nullptr;
  // Never destroyed: CUDA may be gone before static objects are.
  static AllCounters& all = *new AllCounters;
  const std::lock_guard<std::mutex> lock(all.mutex);
  Tensor& counters = all.tensors[counters_key()];
  if (!counters.defined() || counters.numel() < count) {
    // Zeroing them is captured with the rest, so that every replay of a graph starts from zeros.
    counters = at::zeros({count}, at::TensorOptions(kDevice).dtype(at::kInt));
  }
  return reinterpret_cast<uint32_t*>(counters.mutable_data_ptr<int32_t>());
}

}  // namespace cuda
}  // namespace peft_kernels
