// The cases that test_machine.py runs by name, on the machine of this folder or unchanged on a card: ordinary
// CUDA. A failing case throws.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace cases {

using Cases = std::map<std::string, std::function<void()>>;

const Cases& thread_faults();  // kernels with planted faults: NAME-broken and NAME-fixed
const Cases& memory_faults();
const Cases& block_faults();
const Cases& value_cases();  // instructions against plain C++
const Cases& matrix_cases();
const Cases& memory_cases();   // memory, launches
const Cases& machine_cases();  // only on the machine

inline void expect(bool holds, const std::string& what) {
  if (!holds) throw std::runtime_error("expected: " + what);
}
inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(error));
}

// Device memory.
template <class T>
class Array {
 public:
  explicit Array(const std::vector<T>& values) : size_(values.size()) {
    check(cudaMalloc(&data_, size_ * sizeof(T)));
    check(cudaMemcpy(data_, values.data(), size_ * sizeof(T), cudaMemcpyHostToDevice));
  }
  explicit Array(size_t size) : Array(std::vector<T>(size)) {}
  Array(const Array&) = delete;
  Array& operator=(const Array&) = delete;
  ~Array() { cudaFree(data_); }

  T* data() const { return static_cast<T*>(data_); }
  std::vector<T> values() const {
    std::vector<T> result(size_);
    check(cudaMemcpy(result.data(), data_, size_ * sizeof(T), cudaMemcpyDeviceToHost));
    return result;
  }

 private:
  size_t size_;
  void* data_ = nullptr;
};

// Launches a kernel with one parameter and waits for it. Not with `<<<>>>`, which clang-format breaks up.
template <class Parameter>
void run(void (*kernel)(Parameter), Parameter parameter, int blocks, int threads, int shared_bytes) {
  void* arguments[] = {&parameter};
  check(cudaLaunchKernel(reinterpret_cast<const void*>(kernel), dim3(static_cast<unsigned>(blocks)),
                         dim3(static_cast<unsigned>(threads)), arguments, static_cast<size_t>(shared_bytes),
                         nullptr));
  check(cudaDeviceSynchronize());
}

#ifdef __CUDACC__
template <class T>
__device__ T* shared_memory() {
  extern __shared__ uint4 start[];
  return reinterpret_cast<T*>(start);
}
#endif

}  // namespace cases
