// Handlers of lane-wise instructions: apply the functor Of to each lane.
#pragma once

#include "warp.h"

namespace ptx {

template <class Of, class D, class A>
void unary(Warp& warp, const Instruction& i) {
  const auto* a = warp.in<A>(i.a);
  alignas(64) D result[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) result[lane] = Of()(A(a[lane]));
  keep(warp, i.d, result);
}

template <class Of, class D, class A, class B = A>
void binary(Warp& warp, const Instruction& i) {
  const auto* a = warp.in<A>(i.a);
  const auto* b = warp.in<B>(i.b);
  alignas(64) D result[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) result[lane] = Of()(A(a[lane]), B(b[lane]));
  keep(warp, i.d, result);
}

template <class Of, class D, class A, class B = A, class C = B>
void ternary(Warp& warp, const Instruction& i) {
  const auto* a = warp.in<A>(i.a);
  const auto* b = warp.in<B>(i.b);
  const auto* c = warp.in<C>(i.c);
  alignas(64) D result[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) result[lane] = Of()(A(a[lane]), B(b[lane]), C(c[lane]));
  keep(warp, i.d, result);
}

}  // namespace ptx
