// The registers of a warp that wgmma uses: which ones it still reads or writes, and which ones were written
// since the last wgmma.fence. Registers are known by number, not by place, and moves keep what is known, as
// the compiler's moves are none in the end.
#pragma once

#include <cstdint>
#include <vector>

namespace ptx {

class RegistersInFlight {
 public:
  struct State {
    uint64_t written = 0;  // number of the write
    uint64_t operation = 0;
    uint16_t site = 0;
    bool is_operand = false;  // only read by the operation
  };
  struct Operation {
    uint64_t number = 0;
    int group = 0;
    uint32_t tick = 0;
  };

  void start(size_t registers) {
    states_.assign(registers, {});
    operations_.clear();
    writes_ = fenced_ = issued_ = completed_ = 0;
    has_fenced_ = false;
    groups_ = 0;
  }

  bool is_in_flight(int32_t reg) const { return state(reg).operation > completed_; }
  bool is_fenced(int32_t reg) const { return has_fenced_ && state(reg).written <= fenced_; }
  bool has_fenced() const { return has_fenced_; }
  const State& state(int32_t reg) const { return states_[static_cast<size_t>(reg)]; }

  void write(int32_t reg) {
    if (static_cast<size_t>(reg) < states_.size())
      states_[static_cast<size_t>(reg)] = {++writes_, 0, 0, false};
  }
  void move(int32_t to, int32_t from) { states_[static_cast<size_t>(to)] = state(from); }
  void fence() {
    has_fenced_ = true;
    fenced_ = writes_;
  }

  void issue(uint32_t tick) { operations_.push_back({++issued_, groups_, tick}); }
  // A register of the operation issued last.
  void use(int32_t reg, uint16_t site, bool is_operand) {
    State& used = states_[static_cast<size_t>(reg)];
    used = {used.written, issued_, site, is_operand};
  }
  void commit() { ++groups_; }
  // Completes all groups but the last `pending`; returns the tick of the last operation, 0 if there is none.
  uint32_t wait(int pending) {
    uint32_t last = 0;
    size_t done = 0;
    for (; done < operations_.size() && operations_[done].group < groups_ - pending; ++done) {
      completed_ = operations_[done].number;
      last = operations_[done].tick;
    }
    operations_.erase(operations_.begin(), operations_.begin() + static_cast<int64_t>(done));
    return last;
  }
  bool any() const { return !operations_.empty(); }

 private:
  std::vector<State> states_;
  std::vector<Operation> operations_;  // in flight, oldest first
  uint64_t writes_ = 0, fenced_ = 0, issued_ = 0, completed_ = 0;
  bool has_fenced_ = false;
  int groups_ = 0;
};

}  // namespace ptx
