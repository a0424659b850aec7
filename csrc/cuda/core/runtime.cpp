// The device, stream and card that ops use: of CUDA, or of the PTX machine.
#include <ATen/ATen.h>
// Ahead of all others: it is precompiled (tools/precompiled.py).

#include "runtime.h"

#ifdef PEFT_KERNELS_PTX
#  include <vector>

#  include "runtime/cudart.h"
#else
#  include <c10/cuda/CUDAException.h>
#  include <c10/cuda/CUDAFunctions.h>
#  include <c10/cuda/CUDAStream.h>

#  include <map>

#  include "counters.h"
#endif

namespace peft_kernels {

#ifdef PEFT_KERNELS_PTX

void check_device(const Tensor& t, const char* name) {
  TORCH_CHECK(t.device().is_cpu(), name, ": expected a CPU tensor, got one on ", t.device());
}

namespace cuda {
namespace {

constexpr auto kDevice = at::kCPU;

Card& card() {
  static Card card{80, 4, 163 << 10, 1024};
  return card;
}
// Number of cards set so far, used as the device index: device memory does not survive a change of card, so
// what a kernel left there when it was stopped is gone after set_card().
int cards = 0;
bool capturing = false;

}  // namespace

OnDeviceOf::OnDeviceOf(const Tensor& t, const char* name) { check_device(t, name); }
OnDeviceOf::~OnDeviceOf() = default;

Stream current_stream() { return {}; }
bool is_capturing() { return capturing; }
void set_capturing(bool value) { capturing = value; }
int current_device() { return cards; }

const Card& current_card() { return card(); }

void set_card(const Card& new_card) {
  ++cards;
  card() = new_card;
  cudart::set_card(new_card.compute_capability, new_card.shared_bytes, new_card.reserved_bytes);
}

uint32_t* CallContext::counters(int64_t count) {
  // A kernel runs to its end in the calling thread before launch() returns.
  thread_local std::vector<uint32_t> counters;
  thread_local int owner = 0;
  if (owner != cards) counters.clear(), owner = cards;
  if (static_cast<int64_t>(counters.size()) < count) counters.resize(static_cast<size_t>(count));
  return count == 0 ? nullptr : counters.data();
}

#else

void check_device(const Tensor& t, const char* name) {
  TORCH_CHECK(t.is_cuda() && t.device().index() == c10::cuda::current_device(), name,
              ": expected a tensor on cuda:", static_cast<int>(c10::cuda::current_device()),
              " like the first one, got one on ", t.device());
}

namespace cuda {
namespace {

constexpr auto kDevice = at::kCUDA;

}  // namespace

OnDeviceOf::OnDeviceOf(const Tensor& t, const char* name) {
  TORCH_CHECK(t.is_cuda(), name, ": expected a CUDA tensor, got one on ", t.device());
  before_ = c10::cuda::ExchangeDevice(t.device().index());
}
OnDeviceOf::~OnDeviceOf() { c10::cuda::MaybeSetDevice(before_); }

Stream current_stream() { return c10::cuda::getCurrentCUDAStream().stream(); }

int current_device() { return c10::cuda::current_device(); }

bool is_capturing() {
  cudaStreamCaptureStatus status{};
  C10_CUDA_CHECK(cudaStreamIsCapturing(current_stream(), &status));
  return status != cudaStreamCaptureStatusNone;
}

const Card& current_card() {
  thread_local std::map<int, Card> cards;
  const int device = c10::cuda::current_device();
  auto found = cards.find(device);
  if (found == cards.end()) found = cards.emplace(device, card_of(device)).first;
  return found->second;
}

uint32_t* CallContext::counters(int64_t count) {
  return count == 0 ? nullptr : counters_on(c10::cuda::current_device(), stream, count);
}

#endif

Tensor empty_words(int64_t count) { return at::empty({count}, at::TensorOptions(kDevice).dtype(at::kLong)); }

void* CallContext::workspace(int64_t bytes) {
  if (bytes == 0) return nullptr;
  workspace_ = at::empty({bytes}, at::TensorOptions(kDevice).dtype(at::kByte));
  return workspace_.mutable_data_ptr();
}

}  // namespace cuda
}  // namespace peft_kernels
