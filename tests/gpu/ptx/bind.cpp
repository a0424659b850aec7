// The machine, and the replacement of the CUDA runtime, as a Python module. Ops are registered when it is
// loaded.
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <pybind11/functional.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "cases/cases.cuh"
#include "machine/guarded.h"
#include "nf4/nf4.h"
#include "runtime/cudart.h"

namespace peft_kernels::cudart {
namespace {

const cases::Cases& all_cases() {
  static const cases::Cases all = [] {
    cases::Cases found;
    for (const auto* group :
         {&cases::thread_faults(), &cases::memory_faults(), &cases::block_faults(), &cases::value_cases(),
          &cases::matrix_cases(), &cases::memory_cases(), &cases::machine_cases()}) {
      found.insert(group->begin(), group->end());
    }
    return found;
  }();
  return all;
}

struct Loaded {
  ptx::ModulePointer module;

  void run(const std::string& entry, std::array<unsigned, 3> blocks, unsigned threads, int64_t shared_bytes,
           const std::vector<std::string>& parameters, bool same_writes) {
    std::vector<const void*> arguments;
    for (const std::string& bytes : parameters) arguments.push_back(bytes.data());
    const ptx::Launch launch{blocks[0], threads,   shared_bytes, arguments.data(),
                             blocks[1], blocks[2], same_writes};
    ptx::run(*module, entry, launch);
  }
};

// As a program encodes it. `type` and `swizzle` are the driver's numbers. Returns 128 bytes.
pybind11::bytes encode_tensor_map(int type, uintptr_t address, std::array<cuuint64_t, 2> sizes,
                                  cuuint64_t stride, std::array<cuuint32_t, 2> box, int swizzle) {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
  constexpr unsigned kVersion = 12000;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, kVersion,
                                                             cudaEnableDefault, &result);
  TORCH_CHECK(error == cudaSuccess && result == cudaDriverEntryPointSuccess, "no cuTensorMapEncodeTiled");
  const auto encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  alignas(64) CUtensorMap map;
  const cuuint32_t steps[] = {1, 1};
  const CUresult done = encode(&map, static_cast<CUtensorMapDataType>(type), 2,
                               reinterpret_cast<void*>(address), sizes.data(), &stride, box.data(), steps,
                               CU_TENSOR_MAP_INTERLEAVE_NONE, static_cast<CUtensorMapSwizzle>(swizzle),
                               CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  TORCH_CHECK(done == CUDA_SUCCESS, "cuTensorMapEncodeTiled: error ", static_cast<int>(done));
  return {reinterpret_cast<const char*>(&map), sizeof(map)};
}

// Takes addresses, because no op covers every kind of part.
void dequantize_part(uintptr_t packed, uintptr_t absmax, int block_shift, std::array<int64_t, 5> part,
                     uintptr_t out, int64_t out_stride, int dtype) {
  cuda::Nf4View weight{};
  weight.packed = weight.scale_code = reinterpret_cast<const uint8_t*>(packed);
  weight.scale = reinterpret_cast<const float*>(absmax);
  weight.block_shift = block_shift;
  const auto [row_begin, row_end, col_begin, col_end, ld] = part;
  cuda::dequantize_nf4(weight, {row_begin, row_end, col_begin, col_end, ld}, reinterpret_cast<void*>(out),
                       static_cast<DType>(dtype), out_stride, nullptr);
}

// torch's CPU allocator while guarding is on.
struct GuardedAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* pointer = bytes == 0 ? nullptr : allocate_guarded(bytes);
    TORCH_CHECK(pointer != nullptr || bytes == 0, "no memory for a tensor of ", bytes, " bytes");
    return {pointer, pointer, free_guarded, c10::Device(c10::DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return free_guarded; }
  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

void set_guarded(bool guarded) {
  static c10::Allocator* const usual = c10::GetCPUAllocator();
  static GuardedAllocator guarding;
  c10::SetCPUAllocator(guarded ? &guarding : usual);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def(
      "set_seed", [](uint32_t seed) { ptx::options().seed = seed; },
      "Set the seed of the order in which warps run.");
  m.def(
      "set_resident_blocks", [](int blocks) { ptx::options().resident_blocks = blocks; },
      "Set the number of concurrent blocks; 0: chosen by the seed.");
  m.def(
      "set_truncate_sums", [](bool truncate) { ptx::options().truncate_sums = truncate; },
      "Whether matrix instructions truncate sums, as tensor cores do.");
  m.def(
      "set_perturb_approximations", [](bool perturb) { ptx::options().perturb_approximations = perturb; },
      "Whether results of .approx instructions are perturbed within their error.");
  m.def(
      "set_edit",
      [](const std::optional<std::function<std::string(std::string)>>& edit) {
        set_edit(edit ? *edit : nullptr);
      },
      "Set a function that edits the PTX before it runs; None: no edit.");
  m.def(
      "set_report_unwritten", [](bool report) { ptx::options().report_unwritten = report; },
      "Whether reading unwritten shared memory is a fault.");
  m.def(
      "set_shared_start", [](int64_t address) { ptx::options().first_shared_address = address; },
      "Set the address of shared memory; initially that of the card.");
  m.def(
      "note_launches",
      [](bool note) {
        static std::vector<Note> notes;
        std::vector<std::tuple<std::string, unsigned, unsigned, int64_t>> found;
        for (Note& each : notes) {
          found.emplace_back(std::move(each.kernel), each.blocks, each.threads, each.shared_bytes);
        }
        notes.clear();
        note_launches(note ? &notes : nullptr);
        return found;
      },
      "Whether launches are recorded instead of run. Returns those recorded since the last call: kernel, "
      "blocks, threads per block, bytes of shared memory.");
  m.def("set_sticky_error", set_sticky_error, "Set an error that every CUDA call returns; 0: none.");
  m.def(
      "bank_counts",
      [] {
        std::map<std::string, std::tuple<int64_t, int64_t, int64_t>> counts;
        for (const auto& [line, count] : ptx::bank_counts()) {
          counts[line] = {count.accesses, count.wavefronts, count.conflicts};
        }
        return counts;
      },
      "Warp-wide accesses to shared memory, their wavefronts and conflicts, by line.");
  m.def("reset_bank_counts", ptx::reset_bank_counts, "");
  m.def(
      "executed",
      [] {
        using Instruction = std::tuple<std::string, std::string, std::string, uint64_t>;
        std::vector<std::tuple<int, int, std::vector<Instruction>, std::vector<std::string>>> result;
        for (Executed& one : executed()) {
          std::vector<Instruction> instructions;
          for (ptx::Executed& i : one.instructions) {
            instructions.emplace_back(std::move(i.entry), std::move(i.line), std::move(i.text), i.times);
          }
          result.emplace_back(one.binary, one.architecture, std::move(instructions),
                              std::move(one.never_run));
        }
        return result;
      },
      "For each fat binary: its index, the architecture, the instructions of the kernels that ran, as "
      "(kernel, line, text, count), and the kernels that did not run.");
  pybind11::class_<Loaded>(m, "Module", "A PTX module loaded from text.")
      .def("run", &Loaded::run, pybind11::arg("entry"), pybind11::arg("blocks"), pybind11::arg("threads"),
           pybind11::arg("shared_bytes"), pybind11::arg("parameters"), pybind11::arg("same_writes") = false,
           "Run a kernel: name, blocks (x, y, z), threads, bytes of shared memory, parameters as bytes, and "
           "whether threads may write the same value to the same address of shared memory.")
      .def(
          "read_all", [](const Loaded& loaded) { ptx::read_all(*loaded.module); },
          "Decode all kernels, instead of when each is first run.");
  m.def(
      "load", [](const std::string& text) { return std::make_unique<Loaded>(Loaded{ptx::load(text)}); },
      "Load a Module from PTX text.");
  m.def(
      "encode_tensor_map", encode_tensor_map,
      "A CUtensorMap, as bytes: data type, address, sizes (inner first), bytes between rows, box, swizzle.");
  m.def("set_guarded", set_guarded, "Whether accesses past the end of new CPU tensors are faults.");
  m.def("dequantize_part", dequantize_part,
        "Dequantise part of a weight: packed codes, absmax, log2 of the blocksize, (row_begin, row_end, "
        "col_begin, col_end, ld), output, its row stride, and 0, 1 or 2 for fp32, bf16, fp16.");
  m.def(
      "cases",
      [] {
        std::vector<std::string> names;
        for (const auto& [name, run] : all_cases()) names.push_back(name);
        return names;
      },
      "The names of the cases of tests/gpu/ptx/cases.");
  m.def(
      "run_case", [](const std::string& name) { all_cases().at(name)(); },
      "Run a case; raises what it throws.");
}

}  // namespace peft_kernels::cudart
