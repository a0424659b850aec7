// Cached device tables that kernels read: the addresses and sizes of an optimizer's parameters, rewritten
// when tensors change.
#pragma once

#include <cstring>
#include <list>
#include <mutex>
#include <vector>

#include "../core/runtime.h"
#include "adamw.h"

namespace peft_kernels::cuda {

// Returns a table on the current device with the given contents; writes it on the current stream if it is not
// among the last few. During graph capture the cache is neither read nor changed: the graph writes its own
// table each replay, to its own memory.
class DeviceTables {
 public:
  using Words = std::vector<uint64_t>;

  // The caller keeps the tensor until its kernels are launched.
  Tensor find(const Words& words) {
    if (is_capturing()) return written(words);
    const std::lock_guard lock(mutex_);
    const Stream stream = current_stream();
    const auto device = current_device();
    for (auto it = tables_.begin(); it != tables_.end(); ++it) {
      if (it->stream != stream || it->device != device || it->words != words) continue;
      tables_.splice(tables_.begin(), tables_, it);
      return it->on_device;
    }
    tables_.push_front({words, device, stream, written(words)});
    if (tables_.size() > kMost) tables_.pop_back();
    return tables_.front().on_device;
  }

 private:
  struct Entry {
    Words words;
    int device;
    Stream stream;  // it was written on: another stream would have to wait
    Tensor on_device;
  };
  static constexpr size_t kMost = 16;

  static Tensor written(const Words& words) {
    Tensor table = empty_words(static_cast<int64_t>(words.size()));
    store_table(words.data(), static_cast<int64_t>(words.size()),
                reinterpret_cast<uint64_t*>(table.mutable_data_ptr()), current_stream());
    return table;
  }

  std::mutex mutex_;
  std::list<Entry> tables_;
};

}  // namespace peft_kernels::cuda
