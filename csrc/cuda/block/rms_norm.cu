// Launches RmsNorm and RmsNormLoop.
#include "norm_launch.cuh"
#include "rms_norm.cuh"

namespace peft_kernels::cuda {
namespace {

template <class Kernel>
void start(const RmsNormForward& params, const Card& card, Stream stream) {
  launch<Kernel>(params, row_blocks<Kernel>(params.rows.m, card), stream, sizeof(typename Kernel::Shared));
}

template <class T, bool kAdd>
struct Start {
  const RmsNormForward& params;
  const Card& card;
  Stream stream;

  template <int kRowThreads, int kElements>
  void operator()(RowLayout<kRowThreads, kElements>) const {
    start<RmsNorm<T, kAdd, kRowThreads, kElements>>(params, card, stream);
  }
  void operator()(LoopOverVectors) const {
    start<RmsNormLoop<T, kAdd, 16 / sizeof(T)>>(params, card, stream);
  }
  void operator()(LoopOverElements) const { start<RmsNormLoop<T, kAdd, 1>>(params, card, stream); }
};

}  // namespace

void rms_norm(const RmsNormForward& params, const Card& card, Stream stream) {
  with_type(params.rows.dtype, [&](auto type) {
    using T = decltype(type);
    params.residual ? with_row_layout<T>(params.rows.features, Start<T, true>{params, card, stream})
                    : with_row_layout<T>(params.rows.features, Start<T, false>{params, card, stream});
  });
}

}  // namespace peft_kernels::cuda
