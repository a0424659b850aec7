// What the interfaces of all kernels share: the card, and the stream and scratch memory of a call.
//
// Interfaces are plain pointers, without torch: the ops (*_ops.cpp) fill the structs of a family's header,
// its *.cu files implement the functions. Matrices are row-major, sizes are in elements, and a pointer with a
// DType next to it points to elements of that type.
//
// Every function throws if a launch fails, works asynchronously on a stream, and uses no memory beyond its
// arguments and its Context. Results are the same from run to run.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "../../common/dtype.h"
#include "stream.h"

namespace peft_kernels::cuda {

struct Card {
  int compute_capability;  // 80, 90, ...
  int sms;
  int64_t shared_bytes;    // of a block, maximum
  int64_t reserved_bytes;  // maximum shared memory that the system reserves before a block's own
};
// Queries the runtime. Throws std::runtime_error on failure.
Card card_of(int device);

// The stream and scratch memory of one function call.
class Context {
 public:
  Context(const Card& card, Stream stream) : card(card), stream(stream) {}

  const Card& card;
  const Stream stream;

  // Uninitialised. Called at most once.
  virtual void* workspace(int64_t bytes) = 0;
  // At least `count` zeros, which kernels must leave zero again.
  virtual uint32_t* counters(int64_t count) = 0;

 protected:
  ~Context() = default;
};

// Whether all pointers are aligned to `bytes`; null is.
inline bool are_aligned(std::initializer_list<const void*> pointers, uintptr_t bytes = 16) {
  for (const void* p : pointers) {
    if (reinterpret_cast<uintptr_t>(p) % bytes != 0) return false;
  }
  return true;
}

// Whether rows of `features` 16-bit elements, or floats, can be read in vectors of 16 bytes.
inline bool has_vectors(const void* rows, int64_t features) {
  return features % 8 == 0 && are_aligned({rows});
}

// Into how many parts to split a sum of `length` terms, so that `blocks` times that fills the card.
inline int splits_for(int64_t blocks, int64_t length, const Card& card, int blocks_per_sm = 2) {
  if (blocks == 0) return 1;
  return static_cast<int>(std::max<int64_t>(std::min(blocks_per_sm * int64_t{card.sms} / blocks, length), 1));
}

}  // namespace peft_kernels::cuda
