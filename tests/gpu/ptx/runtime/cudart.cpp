// The functions of the CUDA runtime that programs and nvcc's generated code call.
#include "cudart.h"

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "../machine/guarded.h"
#include "../text/fat_binary.h"
#include "../text/module.h"

namespace peft_kernels::cudart {
namespace {

constexpr int64_t kDefaultShared = 48 << 10;  // of a block without opt-in
constexpr unsigned kMaxThreads = 1024;

struct Binary {
  std::map<Target, std::string_view> texts;
  std::map<Target, ptx::ModulePointer> modules;  // loaded on demand
  std::map<Target, ptx::ModulePointer> edited;   // likewise, of edited texts
};

// An integer from the environment.
int setting(const char* name, int otherwise) {
  const char* value = std::getenv(name);
  return value == nullptr || *value == 0 ? otherwise : std::atoi(value);
}

struct Function {
  Binary* binary;
  std::string name;
  int64_t dynamic_shared = 0;   // opt-in
  bool has_all_shared = false;  // the opt-in is the card's maximum
};

struct Configuration {
  dim3 grid, block;
  size_t shared_bytes;
  cudaStream_t stream;
};

struct Runtime {
  std::mutex mutex;
  std::vector<Binary*> binaries;
  std::map<const void*, Function> functions;  // by the address of the host stub
  std::vector<Configuration> pushed;
  int compute_capability = setting("PEFT_KERNELS_PTX_ARCH", 80);
  std::function<std::string(std::string)> edit;
  std::vector<Note>* notes = nullptr;
  cudaError_t last = cudaSuccess, sticky = cudaSuccess;

  cudaError_t result(cudaError_t error) {
    if (sticky != cudaSuccess) return sticky;
    if (error != cudaSuccess) last = error;
    return error;
  }

  Function* find(const void* stub) {
    const auto found = functions.find(stub);
    return found == functions.end() ? nullptr : &found->second;
  }

  // The module that the card would use, or null if none fits.
  ptx::Module* module_of(const Function& function) const {
    Binary& binary = *function.binary;
    auto text = binary.texts.upper_bound({compute_capability, true});
    do {
      if (text == binary.texts.begin()) return nullptr;
      --text;
    } while (text->first.alone && text->first.architecture != compute_capability);
    ptx::ModulePointer& module = (edit ? binary.edited : binary.modules)[text->first];
    if (module == nullptr)
      module = edit ? ptx::load(edit(std::string(text->second))) : ptx::load(text->second);
    return module.get();
  }

  cudaError_t launch(Function* function, dim3 grid, dim3 block, void** arguments, size_t shared_bytes) {
    if (sticky != cudaSuccess) return sticky;
    if (function == nullptr) return result(cudaErrorInvalidDeviceFunction);
    ptx::Module* module = module_of(*function);
    if (module == nullptr) return result(cudaErrorNoKernelImageForDevice);
    if (block.y != 1 || block.z != 1) {
      throw std::runtime_error("the machine runs blocks of one dimension alone");
    }
    constexpr unsigned kMaxOthers = 0xffff;
    if (grid.x == 0 || grid.x > 0x7fffffffu || grid.y == 0 || grid.y > kMaxOthers || grid.z == 0 ||
        grid.z > kMaxOthers || block.x == 0 || block.x > kMaxThreads) {
      return result(cudaErrorInvalidConfiguration);
    }
    const ptx::Attributes has = ptx::attributes(*module, function->name);
    const int64_t allowed = std::max(kDefaultShared - has.static_shared, function->dynamic_shared);
    if (static_cast<int64_t>(shared_bytes) > allowed) return result(cudaErrorInvalidValue);
    if (has.max_threads > 0 && block.x > static_cast<unsigned>(has.max_threads)) {
      return result(cudaErrorInvalidValue);
    }
    if (notes != nullptr) {
      notes->push_back({ptx::readable(function->name), grid.x, block.x, static_cast<int64_t>(shared_bytes)});
      return cudaSuccess;
    }
    ptx::run(*module, function->name,
             {grid.x, block.x, static_cast<int64_t>(shared_bytes), arguments, grid.y, grid.z});
    return cudaSuccess;
  }
};

// Never destroyed: objects compiled by nvcc unregister themselves at exit.
Runtime& runtime() {
  static Runtime& runtime = []() -> Runtime& {
    ptx::options().truncate_sums = setting("PEFT_KERNELS_PTX_TRUNCATE", 0) != 0;
    return *new Runtime;
  }();
  return runtime;
}

}  // namespace

void set_card(int compute_capability, int64_t shared_bytes, int64_t reserved_bytes) {
  Runtime& r = runtime();
  r.compute_capability = compute_capability;
  ptx::options().shared_limit = shared_bytes;
  ptx::options().first_shared_address = compute_capability >= 90 ? reserved_bytes : 0;
  // Opt-ins do not carry over to another card; but callers who opted in to the maximum do not ask again.
  for (auto& [stub, function] : r.functions) {
    function.dynamic_shared = function.has_all_shared ? shared_bytes : 0;
  }
}

void set_edit(std::function<std::string(std::string)> edit) {
  runtime().edit = std::move(edit);
  for (Binary* binary : runtime().binaries) binary->edited.clear();
}

void note_launches(std::vector<Note>* notes) { runtime().notes = notes; }

void set_sticky_error(int error) { runtime().sticky = static_cast<cudaError_t>(error); }

std::vector<Executed> executed() {
  std::vector<Executed> result;
  int index = 0;
  for (const Binary* binary : runtime().binaries) {
    for (const auto& [target, module] : binary->modules) {
      std::set<std::string> ran;
      Executed all{index, target.architecture, {}, {}};
      for (ptx::Executed& instruction : ptx::executed(*module)) {
        ran.insert(instruction.entry);
        all.instructions.push_back(std::move(instruction));
      }
      for (const std::string& entry : ptx::entries(*module)) {
        const std::string name = ptx::readable(entry);
        if (ran.count(name) == 0) all.never_run.push_back(name);
      }
      result.push_back(std::move(all));
    }
    ++index;
  }
  return result;
}

}  // namespace peft_kernels::cudart

using peft_kernels::cudart::runtime;

// ---- Called by nvcc's generated code ------------------------------------------------------------------

extern "C" {

void** __cudaRegisterFatBinary(void* wrapper) {
  auto* binary = new peft_kernels::cudart::Binary{peft_kernels::cudart::ptx_texts(wrapper), {}};
  runtime().binaries.push_back(binary);
  return reinterpret_cast<void**>(binary);
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}

void __cudaRegisterFunction(void** binary, const char* stub, char*, const char* name, int, uint3*, uint3*,
                            dim3*, dim3*, int*) {
  runtime().functions[stub] = {reinterpret_cast<peft_kernels::cudart::Binary*>(binary), name};
}
// Device variables are placed by the PTX; the host never asks for one.
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared_bytes, CUstream_st* stream) {
  runtime().pushed.push_back({grid, block, shared_bytes, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared_bytes, void* stream) {
  const auto pushed = runtime().pushed.back();
  runtime().pushed.pop_back();
  *grid = pushed.grid;
  *block = pushed.block;
  *shared_bytes = pushed.shared_bytes;
  std::memcpy(stream, &pushed.stream, sizeof(pushed.stream));
  return cudaSuccess;
}

cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* stub) {
  auto* function = runtime().find(stub);
  *kernel = reinterpret_cast<cudaKernel_t>(function);
  return runtime().result(function == nullptr ? cudaErrorInvalidDeviceFunction : cudaSuccess);
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments,
                               size_t shared_bytes, cudaStream_t) {
  const std::lock_guard<std::mutex> lock(runtime().mutex);
  return runtime().launch(reinterpret_cast<peft_kernels::cudart::Function*>(kernel), grid, block, arguments,
                          shared_bytes);
}

// ---- Called by programs -------------------------------------------------------------------------------

cudaError_t cudaLaunchKernel(const void* stub, dim3 grid, dim3 block, void** arguments, size_t shared_bytes,
                             cudaStream_t) {
  const std::lock_guard<std::mutex> lock(runtime().mutex);
  return runtime().launch(runtime().find(stub), grid, block, arguments, shared_bytes);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* stub, void** arguments) {
  return cudaLaunchKernel(stub, config->gridDim, config->blockDim, arguments, config->dynamicSmemBytes,
                          config->stream);
}

cudaError_t cudaFuncSetAttribute(const void* stub, cudaFuncAttribute attribute, int value) {
  auto& r = runtime();
  const std::lock_guard<std::mutex> lock(r.mutex);
  auto* function = r.find(stub);
  if (function == nullptr) return r.result(cudaErrorInvalidDeviceFunction);
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return r.result(cudaSuccess);
  ptx::Module* module = r.module_of(*function);
  if (module == nullptr) return r.result(cudaErrorNoKernelImageForDevice);
  const int64_t has = ptx::attributes(*module, function->name).static_shared;
  if (value < 0 || value + has > ptx::options().shared_limit) return r.result(cudaErrorInvalidValue);
  function->dynamic_shared = value;
  function->has_all_shared = value + has == ptx::options().shared_limit;
  return r.result(cudaSuccess);
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* stub) {
  auto& r = runtime();
  const std::lock_guard<std::mutex> lock(r.mutex);
  auto* function = r.find(stub);
  if (function == nullptr) return r.result(cudaErrorInvalidDeviceFunction);
  ptx::Module* module = r.module_of(*function);
  if (module == nullptr) return r.result(cudaErrorNoKernelImageForDevice);
  const ptx::Attributes has = ptx::attributes(*module, function->name);
  *attributes = {};
  attributes->sharedSizeBytes = static_cast<size_t>(has.static_shared);
  attributes->maxThreadsPerBlock = has.max_threads;
  attributes->maxDynamicSharedSizeBytes = static_cast<int>(function->dynamic_shared);
  attributes->ptxVersion = attributes->binaryVersion = has.target;
  return r.result(cudaSuccess);
}

cudaError_t cudaGetLastError() {
  auto& r = runtime();
  if (r.sticky != cudaSuccess) return r.sticky;
  const cudaError_t error = r.last;
  r.last = cudaSuccess;
  return error;
}
const char* cudaGetErrorName(cudaError_t error) { return cudaGetErrorString(error); }
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return runtime().result(cudaSuccess);
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute != cudaDevAttrMaxSharedMemoryPerBlockOptin) return runtime().result(cudaErrorInvalidValue);
  *value = static_cast<int>(ptx::options().shared_limit);
  return runtime().result(cudaSuccess);
}
cudaError_t cudaPeekAtLastError() {
  return runtime().sticky != cudaSuccess ? runtime().sticky : runtime().last;
}
const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorMemoryAllocation:
      return "out of memory";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDeviceFunction:
      return "invalid device function";
    case cudaErrorNoKernelImageForDevice:
      return "no kernel image is available for execution on the device";
    case cudaErrorIllegalAddress:
      return "an illegal memory access was encountered";
    case cudaErrorLaunchFailure:
      return "unspecified launch failure";
    default:
      return "unrecognized error code";
  }
}

cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  *pointer = peft_kernels::cudart::allocate_guarded(bytes);
  if (*pointer == nullptr) return runtime().result(cudaErrorMemoryAllocation);
  std::memset(*pointer, 0xff, bytes);  // unwritten memory is NaN
  return runtime().result(cudaSuccess);
}
cudaError_t cudaFree(void* pointer) {
  peft_kernels::cudart::free_guarded(pointer);
  return runtime().result(cudaSuccess);
}
cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  std::memcpy(to, from, bytes);
  return runtime().result(cudaSuccess);
}
cudaError_t cudaMemset(void* to, int value, size_t bytes) {
  std::memset(to, value, bytes);
  return runtime().result(cudaSuccess);
}
cudaError_t cudaDeviceSynchronize() { return runtime().result(cudaSuccess); }

}  // extern "C"
