// A stand-in for the driver's cuTensorMapEncodeTiled, found as programs without libcuda find it. It refuses
// what the driver refuses, and writes a TensorMap.
#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstring>
#include <string_view>

#include "../machine/tensor_map.h"

namespace peft_kernels::cudart {
namespace {

constexpr uint64_t kMapAlign = 64, kAlign = 16, kMaxStride = uint64_t{1} << 40, kMaxSize = uint64_t{1} << 32;
constexpr uint32_t kMaxRank = 5, kMaxBox = 256, kMaxStep = 8;

// 0: not a type.
int bytes_of(CUtensorMapDataType type) {
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8:
      return 1;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT16:
    case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16:
      return 2;
    case CU_TENSOR_MAP_DATA_TYPE_UINT32:
    case CU_TENSOR_MAP_DATA_TYPE_INT32:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT32:
      return 4;
    case CU_TENSOR_MAP_DATA_TYPE_UINT64:
    case CU_TENSOR_MAP_DATA_TYPE_INT64:
    case CU_TENSOR_MAP_DATA_TYPE_FLOAT64:
      return 8;
    default:
      return 0;
  }
}

// Bytes of a swizzled row; 16: not swizzled, 0: unknown.
uint32_t span_of(CUtensorMapSwizzle swizzle) {
  switch (swizzle) {
    case CU_TENSOR_MAP_SWIZZLE_NONE:
      return 16;
    case CU_TENSOR_MAP_SWIZZLE_32B:
      return 32;
    case CU_TENSOR_MAP_SWIZZLE_64B:
      return 64;
    case CU_TENSOR_MAP_SWIZZLE_128B:
      return 128;
    default:
      return 0;
  }
}

CUresult encode_tiled(CUtensorMap* to, CUtensorMapDataType type, cuuint32_t rank, void* address,
                      const cuuint64_t* sizes, const cuuint64_t* strides, const cuuint32_t* box,
                      const cuuint32_t* steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                      CUtensorMapL2promotion, CUtensorMapFloatOOBfill fill) {
  const auto first = reinterpret_cast<uint64_t>(address);
  if (to == nullptr || reinterpret_cast<uint64_t>(to) % kMapAlign != 0) return CUDA_ERROR_INVALID_VALUE;
  if (rank == 0 || rank > kMaxRank || first == 0 || first % kAlign != 0) return CUDA_ERROR_INVALID_VALUE;
  const int bytes = bytes_of(type);
  const uint32_t span = span_of(swizzle);
  // What a driver takes, but nothing here uses.
  const bool is_modelled = rank == ptx::TensorMap::kRank && interleave == CU_TENSOR_MAP_INTERLEAVE_NONE &&
                           fill == CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE && bytes != 0 && span != 0;
  if (!is_modelled) return CUDA_ERROR_NOT_SUPPORTED;
  for (uint32_t i = 0; i < rank; ++i) {
    if (sizes[i] == 0 || sizes[i] > kMaxSize || box[i] == 0 || box[i] > kMaxBox)
      return CUDA_ERROR_INVALID_VALUE;
    if (steps[i] == 0 || steps[i] > kMaxStep) return CUDA_ERROR_INVALID_VALUE;
    if (steps[i] != 1) return CUDA_ERROR_NOT_SUPPORTED;
  }
  if (strides[0] % kAlign != 0 || strides[0] >= kMaxStride ||
      strides[0] < sizes[0] * static_cast<uint64_t>(bytes)) {
    return CUDA_ERROR_INVALID_VALUE;
  }
  const uint64_t inner = box[0] * static_cast<uint64_t>(bytes);
  const bool is_swizzled = swizzle != CU_TENSOR_MAP_SWIZZLE_NONE;
  if (inner % kAlign != 0 || (is_swizzled && inner > span)) return CUDA_ERROR_INVALID_VALUE;

  ptx::TensorMap map;
  map.address = first;
  map.row_bytes = static_cast<int64_t>(strides[0]);
  map.element_bytes = bytes;
  map.span = span;
  for (uint32_t i = 0; i < rank; ++i) {
    map.size[i] = static_cast<int64_t>(sizes[i]);
    map.box[i] = static_cast<int32_t>(box[i]);
  }
  std::memset(to, 0, ptx::TensorMap::kBytes);
  std::memcpy(to, &map, sizeof(map));
  return CUDA_SUCCESS;
}

}  // namespace
}  // namespace peft_kernels::cudart

extern "C" {

cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned,
                                             unsigned long long, cudaDriverEntryPointQueryResult* found) {
  const bool is_known = std::string_view(symbol) == "cuTensorMapEncodeTiled";
  *function = is_known ? reinterpret_cast<void*>(peft_kernels::cudart::encode_tiled) : nullptr;
  if (found != nullptr) *found = is_known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

}  // extern "C"
