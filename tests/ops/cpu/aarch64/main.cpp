// Runs every case with the selected ISA and compares it with scalar. With an argument it only prints that
// ISA.
#include <sys/mman.h>
#include <unistd.h>

#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>

#include "cases.h"

namespace peft_kernels::cpu::cases {
namespace {

struct Registered {
  const char* name;
  Run run;
};
std::vector<Registered>& all_cases() {
  static std::vector<Registered> cases;
  return cases;
}
std::vector<std::string> problems;

int64_t bytes_of(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

uint16_t bf16_bits(double value) {
  const float x = static_cast<float>(value);
  uint32_t bits;
  memcpy(&bits, &x, sizeof(bits));
  return x != x ? 0x7fc0 : static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// ||got - truth|| / ||truth||, and the maximum |got - truth| relative to the root mean square of the truth.
struct Errors {
  double relative, greatest;
};
template <class Got>
Errors errors_of(int64_t size, const Got& got, const std::vector<double>& truth) {
  double difference = 0, sum = 0, greatest = 0;
  for (int64_t i = 0; i < size; ++i) {
    const double d = std::fabs(got(i) - truth[i]);
    difference += d * d;
    sum += truth[i] * truth[i];
    greatest = d <= greatest ? greatest : d;
  }
  const double least = 1e-300, root = std::sqrt(sum / static_cast<double>(size));
  return {std::sqrt(difference) / std::fmax(std::sqrt(sum), least), greatest / std::fmax(root, least)};
}

double epsilon(DType dtype) {
  return dtype == DType::kF32 ? 0x1p-23 : dtype == DType::kBF16 ? 0x1p-7 : 0x1p-10;
}

}  // namespace

Array::Array(DType dtype, int64_t size) : Array(dtype, size, bytes_of(dtype)) {}
Array::Array(DType dtype, int64_t size, int64_t element_bytes)
    : dtype_(dtype), size_(size), element_bytes_(element_bytes) {
  const int64_t page = sysconf(_SC_PAGESIZE), used = (byte_count() + page - 1) / page * page;
  mapped_ = used + page;
  void* memory = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) perror("mmap"), _exit(2);
  start_ = static_cast<char*>(memory);
  if (mprotect(start_ + used, page, PROT_NONE) != 0) perror("mprotect"), _exit(2);
  data_ = start_ + used - byte_count();
  memset(start_, 0xff, used);  // NaN, in every type
}
Array::Array(const Array& other) : Array(other.dtype_, other.size_, other.element_bytes_) {
  memcpy(data_, other.data_, byte_count());
}
Array::~Array() { munmap(start_, mapped_); }

float Array::at(int64_t i) const {
  if (element_bytes_ == 1) return as<uint8_t>()[i];
  if (dtype_ == DType::kF32) return as<float>()[i];
  if (dtype_ == DType::kF16) return static_cast<float>(as<__fp16>()[i]);
  const uint32_t bits = uint32_t{as<uint16_t>()[i]} << 16;
  float x;
  memcpy(&x, &bits, sizeof(x));
  return x;
}
void Array::set(int64_t i, double value) {
  if (element_bytes_ == 1) {
    as<uint8_t>()[i] = static_cast<uint8_t>(value);
  } else if (dtype_ == DType::kF32) {
    as<float>()[i] = static_cast<float>(value);
  } else if (dtype_ == DType::kF16) {
    as<__fp16>()[i] = static_cast<__fp16>(static_cast<float>(value));
  } else {
    as<uint16_t>()[i] = bf16_bits(value);
  }
}

Array normal(DType dtype, int64_t size, uint64_t seed, double scale) {
  std::mt19937_64 bits(seed);
  Array out(dtype, size);
  for (int64_t i = 0; i < size; ++i) {
    const uint64_t x = bits();  // the sum of four words is close enough to normal
    double sum = 0;
    for (int w = 0; w < 4; ++w) sum += static_cast<double>(x >> 16 * w & 0xffff) / 65536 - 0.5;
    out.set(i, sum * std::sqrt(3.0) * scale);
  }
  return out;
}

Array random_bytes(int64_t size, uint64_t seed) {
  std::mt19937_64 bits(seed);
  Array out = Array::bytes(size);
  for (int64_t i = 0; i < size; ++i) out.as<uint8_t>()[i] = static_cast<uint8_t>(bits());
  return out;
}

double rounded(double x, DType dtype) {
  static Array ones[] = {Array(DType::kF32, 1), Array(DType::kBF16, 1), Array(DType::kF16, 1)};
  Array& one = ones[static_cast<int>(dtype)];
  one.set(0, x);
  return one.at(0);
}

// The number of the code values.
static int codes_of(Form form) { return form == Form::kFp4 ? 1 : form == Form::kByTable ? 2 : 0; }

Weight::Weight(int64_t weight_size, int block_shift, Form form, uint64_t seed)
    : packed(random_bytes((weight_size + 1) / 2, seed)),
      absmax(normal(DType::kF32, (weight_size >> block_shift) + 1, seed + 1)),
      q8(random_bytes(absmax.size(), seed + 2)),
      absmax2(normal(DType::kF32, (absmax.size() >> nf4::kAbsmaxBlockShift) + 1, seed + 3)),
      scale_values(normal(DType::kF32, kScaleCodes, seed + 4)),
      view{},
      size(weight_size) {
  for (int64_t i = 0; i < absmax.size(); ++i) absmax.set(i, std::fabs(absmax.at(i)) + 0.1);
  view.codes = kCodeValues + codes_of(form);
  view.packed = packed.as<uint8_t>();
  view.block_shift = block_shift;
  if (form == Form::kNested) {
    view.q8 = q8.as<uint8_t>();
    view.scale_values = nf4::kDynamicMap;
    view.absmax2 = absmax2.as<float>();
    view.offset = 0.3f;
  } else if (form == Form::kByTable) {
    view.q8 = q8.as<uint8_t>();
    view.scale_values = scale_values.as<float>();
  } else {
    view.absmax = absmax.as<float>();
  }
}
float Weight::at(int64_t i) const {
  const int64_t block = i >> view.block_shift;
  const uint8_t byte = view.packed[i / 2];
  volatile float scale = view.absmax ? view.absmax[block] : view.scale_values[view.q8[block]];
  if (view.absmax2) {
    scale = scale * view.absmax2[block >> nf4::kAbsmaxBlockShift];
    scale = scale + view.offset;
  }
  return view.codes->value[i % 2 ? byte & 15 : byte >> 4] * scale;
}

void problem(const std::string& what) { problems.push_back(what); }

void same_bits(const Array& got, const Array& want, const std::string& what) {
  for (int64_t i = 0; i < got.byte_count(); ++i) {
    if (got.data()[i] == want.data()[i]) continue;
    const int64_t element = i * got.size() / got.byte_count();
    return problem(what + ": element " + std::to_string(element) + " of " + std::to_string(got.size()) +
                   " is " + std::to_string(got.at(element)) + ", expected " +
                   std::to_string(want.at(element)));
  }
}

static void within(const Errors& is, double relative, double greatest, const std::string& what) {
  if (is.relative <= relative && is.greatest <= greatest) return;
  char text[200];
  snprintf(text, sizeof(text), ": errors %.3g and %.3g, allowed %.3g and %.3g", is.relative, is.greatest,
           relative, greatest);
  problem(what + text);
}

void within_policy(const Array& got, const std::vector<double>& plain, const std::vector<double>& truth,
                   const std::string& what) {
  const Errors is = errors_of(
                   got.size(), [&](int64_t i) { return double{got.at(i)}; }, truth),
               may = errors_of(got.size(), [&](int64_t i) { return plain[i]; }, truth);
  const double floor = epsilon(got.dtype());
  within(is, 2 * may.relative + floor, 2 * may.greatest + 4 * floor, what);
}

void like_scalar(const Array& got, const Array& want, const std::string& what) {
  std::vector<double> truth(want.size());
  for (int64_t i = 0; i < want.size(); ++i) truth[i] = want.at(i);
  const Errors is = errors_of(got.size(), [&](int64_t i) { return double{got.at(i)}; }, truth);
  const double floor = std::fmax(epsilon(got.dtype()), 4 * epsilon(DType::kF32));
  within(is, floor, 8 * floor, what);
}

std::string name_of(Form form) {
  const char* names[] = {"NF4", "FP4", "nested", "by table"};
  return names[static_cast<int>(form)];
}

std::string name_of(DType dtype) {
  return dtype == DType::kF32 ? "fp32" : dtype == DType::kBF16 ? "bf16" : "fp16";
}

void* scratch() {
  void* memory = thread_scratch();
  if (!memory) perror("scratch"), _exit(2);
  return memory;
}

Case::Case(const char* name, Run run) { all_cases().push_back({name, run}); }

}  // namespace peft_kernels::cpu::cases

int main(int count, char**) {
  using namespace peft_kernels::cpu;
  if (const char* wrong = select_isa_from_environment()) return printf("%s\n", wrong), 2;
  printf("isa: %s\n", isa_name());
  if (count > 1) return 0;
  for (const auto& one : cases::all_cases()) {
    cases::problems.clear();
    one.run(kernels());
    printf("%s: %s\n", one.name, cases::problems.empty() ? "clean" : "");
    for (size_t p = 0; p < cases::problems.size() && p < 5; ++p) printf("  %s\n", cases::problems[p].c_str());
    fflush(stdout);
  }
}
