// Encodes tensor maps by the driver's function. The library does not link to the driver: the runtime finds
// it.
#include "tensor_map.h"

#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace peft_kernels::cuda {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

Encode find_encode() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result{};
  constexpr const char* kName = "cuTensorMapEncodeTiled";
#if CUDART_VERSION >= 12050
  constexpr unsigned kVersion = 12000;  // of CUDA, which introduced it
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion(kName, &found, kVersion, cudaEnableDefault, &result);
#else
  const cudaError_t error = cudaGetDriverEntryPoint(kName, &found, cudaEnableDefault, &result);
#endif
  if (error != cudaSuccess || result != cudaDriverEntryPointSuccess || found == nullptr) {
    cudaGetLastError();  // clear it: torch would report it after its next kernel
    throw std::runtime_error("the CUDA driver has no cuTensorMapEncodeTiled");
  }
  return reinterpret_cast<Encode>(found);
}

CUtensorMapSwizzle swizzle_of(int row_bytes) {
  switch (row_bytes) {
    case 32:
      return CU_TENSOR_MAP_SWIZZLE_32B;
    case 64:
      return CU_TENSOR_MAP_SWIZZLE_64B;
    case 128:
      return CU_TENSOR_MAP_SWIZZLE_128B;
    default:
      throw std::runtime_error("expected a box of 32, 64 or 128 bytes a row, got " +
                               std::to_string(row_bytes));
  }
}

}  // namespace

void map_matrix(const void* data, int element_bytes, int64_t rows, int64_t columns, int box_rows,
                int box_columns, CUtensorMap& map) {
  static const Encode encode = find_encode();
  // Only the size counts: nothing is computed, and zeros are zeros.
  const CUtensorMapDataType type =
      element_bytes == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(columns * element_bytes)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[] = {1, 1};
  const CUresult result = encode(&map, type, 2, const_cast<void*>(data), sizes, strides, box, steps,
                                 CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle_of(box_columns * element_bytes),
                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) {
    throw std::runtime_error("cuTensorMapEncodeTiled failed with error " + std::to_string(result));
  }
}

}  // namespace peft_kernels::cuda
