// Shared by the cases: arrays followed by a guard page, samples, comparisons.
#pragma once

#include <string>
#include <vector>

#include "../../../../csrc/common/nf4.h"
#include "../../../../csrc/cpu/core/kernel_table.h"

namespace peft_kernels::cpu::cases {

// An array followed by an inaccessible page, so that reading past the end crashes.
class Array {
 public:
  Array(DType dtype, int64_t size);
  Array(const Array& other);
  Array& operator=(const Array&) = delete;
  ~Array();
  static Array bytes(int64_t size) { return Array(DType::kF32, size, 1); }

  DType dtype() const { return dtype_; }
  int64_t size() const { return size_; }
  float at(int64_t i) const;
  void set(int64_t i, double value);  // rounded, once
  char* data() const { return data_; }
  int64_t byte_count() const { return size_ * element_bytes_; }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  Array(DType dtype, int64_t size, int64_t element_bytes);
  DType dtype_;
  int64_t size_, element_bytes_, mapped_;
  char *start_, *data_;
};

inline constexpr DType kTypes[] = {DType::kF32, DType::kBF16, DType::kF16};

// Approximately normal values; the same for the same seed.
Array normal(DType dtype, int64_t size, uint64_t seed, double scale = 1.0);
// Random bits.
Array random_bytes(int64_t size, uint64_t seed);
double rounded(double x, DType dtype);

// NF4 or FP4 with scales in fp32, NF4 with double quantisation, or E2M1 with scales by a table.
enum class Form { kNf4, kFp4, kNested, kByTable };
inline constexpr Form kForms[] = {Form::kNf4, Form::kFp4, Form::kNested, Form::kByTable};
std::string name_of(Form form);

// A packed weight.
struct Weight {
  Array packed, absmax, q8, absmax2, scale_values;
  Nf4View view;
  int64_t size;
  Weight(int64_t size, int block_shift, Form form, uint64_t seed);
  Weight(const Weight&) = delete;
  float at(int64_t i) const;
};

void problem(const std::string& what);
void same_bits(const Array& got, const Array& want, const std::string& what);
// The error bound of tests/testing.py: `plain` is computed without vectors in the dtype of `got`, `truth` in
// fp64.
void within_policy(const Array& got, const std::vector<double>& plain, const std::vector<double>& truth,
                   const std::string& what);
// For kernels that the op tests check with ISA scalar: allows for a few different roundings.
void like_scalar(const Array& got, const Array& want, const std::string& what);
std::string name_of(DType dtype);

// This thread's scratch.
void* scratch();

using Run = void (*)(const KernelTable& tested);
struct Case {
  Case(const char* name, Run run);
};
#define PEFT_KERNELS_CASE(name)                  \
  static void name(const KernelTable&);          \
  static const Case case_of_##name(#name, name); \
  static void name([[maybe_unused]] const KernelTable& tested)

using Arrays = std::vector<Array>;

// Calls use with both ISAs, and compares the results.
template <class Use, class Compare>
void both(const KernelTable& tested, const Use& use, const Compare& compare, const std::string& what) {
  const Arrays got = use(tested), want = use(scalar::kKernels);
  for (size_t i = 0; i < got.size(); ++i) {
    compare(got[i], want[i], what + (got.size() > 1 ? ", result " + std::to_string(i) : ""));
  }
}

}  // namespace peft_kernels::cpu::cases
