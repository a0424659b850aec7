#include "linear.h"

namespace peft_kernels::cuda {
namespace {

constexpr Status kNoKernel = 1;  // cudaErrorInvalidValue

}  // namespace

Status nf4_linear(const LinearParams& params, const Card& card, uint32_t* counters, void* workspace,
                  Stream stream) {
  const auto choice = choose_linear(params.m, params.n, params.k, params.weight.block_shift, card);
  if (choice.name == nullptr || params.dtype == DType::kF32) return kNoKernel;
  const auto start = [&](const auto& shape) {
    return start_linear(shape, params, choice.cut, counters, workspace, stream);
  };
  return std::visit(start, choice.shape);
}

Status nf4_linear_dx(const LinearParams& params, const Card& card, uint32_t* counters, void* workspace,
                     Stream stream) {
  const auto choice = choose_linear_dx(params.m, params.n, params.k, params.weight.block_shift, card);
  if (choice.name == nullptr || params.dtype == DType::kF32) return kNoKernel;
  return start_linear_dx(choice.shape, params, choice.cut, counters, workspace, stream);
}

}  // namespace peft_kernels::cuda
