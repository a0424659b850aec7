"""The compiled CUDA kernels: no spills, tensor cores where expected, few instructions."""

from __future__ import annotations

import dataclasses
import re
import shutil
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import pytest

from bench import run
from bench.gpu import compiled, limits, sass, sass_cfg
from bench.gpu.limits import MATRIX, WIDE_STORE, Rule
from bench.gpu.roofline import BY_ARCHITECTURE
from bench.gpu.sass import Cubin, Instruction, Kernel
from bench.lib import report

TOOLS = sass.tools()
needs_tools = pytest.mark.skipif(isinstance(TOOLS, str), reason=str(TOOLS))


def compile_and_read(files: Sequence[Path], architectures: Sequence[int], cache: Path) -> list[Kernel]:
    assert isinstance(TOOLS, sass.Tools)
    return sass.read(TOOLS, sass.compile_all(TOOLS, files, architectures, cache=cache), cache=cache)


@lru_cache(maxsize=1)
def kernels() -> Sequence[Kernel]:
    return compile_and_read(sass.sources(), sass.ARCHITECTURES, sass.CACHE)


@needs_tools
@pytest.mark.parametrize(
    "file,architecture",
    [(path.stem, a) for path in sass.sources() for a in sass.architectures_of(path)],
    ids=lambda value: f"sm{value}" if isinstance(value, int) else value,
)
def test_kernels_stay_within_their_limits(file: str, architecture: int) -> None:
    found = [k for k in kernels() if k.source.stem == file and k.architecture == architecture]
    assert found
    faults = [f"{k.name}: {fault}" for k in found for fault in limits.check(k).faults]
    assert not faults, "\n".join(faults)


@needs_tools
@pytest.mark.parametrize("rule", limits.RULES, ids=lambda rule: rule.pattern)
def test_every_limit_has_its_kernels(rule: Rule) -> None:
    assert any(limits.rule_for(kernel) is rule for kernel in kernels())


TOY = """
#pragma once
#include "core/launch.cuh"
namespace peft_kernels::cuda {

// A GEMM by tensor cores, and by ordinary arithmetic.
template <int kTokens, bool kMatrix, int kUnroll>
struct Gemm {
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerSm = 1;
  struct Params {
    const uint32_t* w;
    const uint32_t* x;
    float* y;
    int steps;
  };
  static DEVICE void run(const Params& p) {
    float c[kTokens / 8][4] = {};
#pragma unroll kUnroll
    for (int step = 0; step < p.steps; ++step) {
      const auto w = load_once(reinterpret_cast<const Words4*>(p.w) + step * kThreads + thread_index());
#pragma unroll
      for (int t = 0; t < kTokens / 8; ++t) {
        const auto x = load(reinterpret_cast<const Words2*>(p.x) + (step * kTokens / 8 + t) * kThreads);
        if constexpr (kMatrix) {
          mma<bf16>(c[t], w.v, x.v);
        } else {
          for (int i = 0; i < 4; ++i) c[t][i] += low_half<bf16>(w.v[i]) * low_half<bf16>(x.v[i % 2]);
        }
      }
    }
    for (int t = 0; t < kTokens / 8; ++t)
      for (int i = 0; i < 4; ++i) store(p.y + 4 * t + i, c[t][i]);
  }
};

struct Spilling {
  static constexpr int kThreads = 1024;
  static constexpr int kBlocksPerSm = 2;
  struct Params {
    float* x;
    int steps;
  };
  static DEVICE void run(const Params& p) {
    float v[96];
    for (int i = 0; i < 96; ++i) v[i] = load(p.x + i * kThreads + thread_index());
    for (int step = 0; step < p.steps; ++step)
#pragma unroll
      for (int i = 0; i < 96; ++i) v[i] = v[i] * v[(i + 7) % 96] + v[(i + 13) % 96];
    for (int i = 0; i < 96; ++i) store(p.x + i * kThreads + thread_index(), v[i]);
  }
};

// Enough registers, but a dynamic index puts the array into local memory.
struct Indexing {
  static constexpr int kThreads = 256;
  static constexpr int kBlocksPerSm = 1;
  struct Shared {
    float x[16384];
  };
  struct Params {
    float* x;
    int i;
  };
  static DEVICE void run(const Params& p) {
    float v[64];
    for (int i = 0; i < 64; ++i) v[i] = load(p.x + i * kThreads + thread_index());
    for (int i = 0; i < p.i; ++i) v[i * p.i & 63] += v[i & 63];
    for (int i = 0; i < 64; ++i) store(p.x + i, v[i]);
  }
};
}  // namespace peft_kernels::cuda
"""
START = """
#include "toy.cuh"
namespace peft_kernels::cuda {
void start(Stream stream) {
  launch<Gemm<8, true, 1>>({}, 1, stream);
  launch<Gemm<8, true, 4>>({}, 1, stream);
  launch<Gemm<64, true, 1>>({}, 1, stream);
  launch<Gemm<8, false, 1>>({}, 1, stream);
  launch<Spilling>({}, 1, stream);
  launch<Indexing>({}, 1, stream, sizeof(Indexing::Shared));
}
}  // namespace peft_kernels::cuda
"""


@pytest.fixture(scope="module", params=(80, 90, 120), ids=lambda a: f"sm{a}")
def toys(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Kernel]:
    if isinstance(TOOLS, str):
        pytest.skip(TOOLS)
    folder = tmp_path_factory.mktemp("toys")
    (folder / "toy.cuh").write_text(TOY)
    (folder / "toy.cu").write_text(START)
    found = compile_and_read([folder / "toy.cu"], [request.param], folder / "cache")
    return {kernel.name: kernel for kernel in found}


@pytest.fixture
def held_to(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Returns a function that sets the limit of Gemm."""

    def hold(limit: float) -> None:
        rules = [Rule(rf"Gemm<{tokens}, .*>", limit, tokens) for tokens in (8, 64)]
        monkeypatch.setattr(limits, "RULES", rules)

    return hold


def test_a_spilling_kernel_is_reported(toys: dict[str, Kernel]) -> None:
    faults = limits.check(toys["Spilling"]).faults
    assert any(re.fullmatch(r"spills \d+ bytes", fault) for fault in faults)
    assert any("accesses to local memory" in fault for fault in faults)


def test_an_array_in_local_memory_is_reported(toys: dict[str, Kernel]) -> None:
    (fault,) = limits.check(toys["Indexing"]).faults
    assert "accesses to local memory" in fault


def test_a_gemm_without_matrix_instructions_is_reported(
    toys: dict[str, Kernel], held_to: Callable[[float], None]
) -> None:
    held_to(100.0)
    assert limits.check(toys["Gemm<8, true, 1>"]).faults == ()
    (fault,) = limits.check(toys["Gemm<8, false, 1>"]).faults
    assert "HMMA" in fault


def test_a_gemm_with_too_many_instructions_is_reported(
    toys: dict[str, Kernel], held_to: Callable[[float], None]
) -> None:
    held_to(0.1)
    finding = limits.check(toys["Gemm<8, true, 1>"])
    assert finding.faults == (f"{finding.per_weight:.2f} instructions per weight, at most 0.1 allowed",)


def test_the_limit_applies_to_the_longest_path(monkeypatch: pytest.MonkeyPatch) -> None:
    branch = Instruction("BRA", True, (".L_x_1",)), Instruction("BRA", False, (".L_x_2",))
    matrix, other, leave = (Instruction(name, False, ()) for name in ("HMMA.16816", "NOP", "EXIT"))
    code = [branch[0], matrix, branch[1], matrix, other, other, leave]
    labels = {".L_x_1": 3, ".L_x_2": 6}
    kernel = Kernel("k", Path(), 90, threads=32, registers=32, instructions=code, labels=labels)
    for limit, faults in ((5 / 8, ()), (4 / 8, ("0.62 instructions per weight, at most 0.5 allowed",))):
        monkeypatch.setattr(limits, "RULES", [Rule("k", limit, tokens=8)])
        finding = limits.check(kernel)
        assert (finding.least, finding.per_weight, finding.faults) == (4 / 8, 5 / 8, faults)


def test_counts_do_not_depend_on_unrolling_or_tokens(
    toys: dict[str, Kernel], held_to: Callable[[float], None]
) -> None:
    held_to(100.0)
    names = [f"Gemm<{arguments}>" for arguments in ("8, true, 1", "8, true, 4", "64, true, 1")]
    assert [sass.count(toys[name].main_path(MATRIX), MATRIX) for name in names] == [1, 4, 8]
    rolled, unrolled, wide = (limits.check(toys[name]).per_weight or 0.0 for name in names)
    # Per 8 weights: one matrix instruction and two loads; with 64 tokens, eight matrix instructions.
    assert 3 / 8 <= unrolled < rolled <= 30 / 8
    assert wide >= 10 / 8


def test_declared_shared_memory_limits_residency(toys: dict[str, Kernel]) -> None:
    kernel = dataclasses.replace(toys["Indexing"], registers=32)
    assert kernel.shared == 65536 and toys["Spilling"].shared == 0
    assert limits.resident_warps(kernel) == {80: 16, 90: 24, 120: 8}[kernel.architecture]


@needs_tools
def test_compiled_once_until_something_included_changes(tmp_path: Path) -> None:
    assert isinstance(TOOLS, sass.Tools)
    source, header, cache = tmp_path / "a.cu", tmp_path / "a.cuh", tmp_path / "cache"
    source.write_text('#include "a.cuh"\n__global__ void a(int* x) { *x = kNumber; }\n')
    header.write_text("constexpr int kNumber = 1;\n")

    def compile_it() -> Cubin:
        (cubin,) = sass.compile_all(TOOLS, [source], [90], tmp_path, cache)
        return cubin

    first = compile_it()
    stamp = first.path.stat().st_mtime_ns
    assert compile_it().path == first.path and first.path.stat().st_mtime_ns == stamp
    header.write_text("constexpr int kNumber = 2;\n")
    assert compile_it().path != first.path
    header.write_text("constexpr int kNumber = ;\n")
    with pytest.raises(RuntimeError, match=r"a\.cuh.*error"):
        compile_it()


LISTING = """
	.section	.nv.info.k,"",@"SHT_CUDA_INFO"
	.sectionflags	@""
	//----- nvinfo : EIATTR_MAX_THREADS
	.align		4
.L_23:
        /*0050*/ 	.byte	0x04, 0x05
        /*0054*/ 	.word	0x00000100
        /*0058*/ 	.word	0x00000001
	.section	.text.k,"ax",@progbits
	.sectioninfo	@"SHI_REGISTERS=96"
.text.k:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/              @!P0 EXIT ;
        /*0020*/                   BSSY B0, `(.L_x_9) ;
.L_x_1:
        /*0030*/                   LDG.E.64.CONSTANT R2, desc[UR6][R4.64] ;
        /*0040*/               @P1 BRA `(.L_x_2) ;
        /*0050*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4  &req={1} ?trans5;
        /*0060*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
        /*0070*/                   BRA `(.L_x_3) ;
.L_x_2:
        /*0080*/                   LDG.E.U8 R2, desc[UR6][R4.64] ;
        /*0090*/                   HMMA.16816.F32.BF16 R4, R4, R8, R4 ;
        /*00a0*/                   IADD3 R4, R4, R8, R4 ;
        /*00b0*/                   IADD3 R4, R4, R8, R4 ;
.L_x_3:
        /*00c0*/                   BRA.U UP0, `(.L_x_1) ;
.L_x_9:
        /*00d0*/                   BSYNC B0 ;
        /*00e0*/              @UP1 BRX R2 -0xe0                (*"BRANCH_TARGETS .L_x_4,.L_x_9"*) ;
.L_x_4:
        /*00f0*/                   STG.E.128 desc[UR6][R4.64], R4 ;
        /*0100*/                   EXIT ;
.L_x_5:
        /*0110*/                   BRA `(.L_x_5) ;
	.section	.text.other,"ax",@progbits
.text.other:
        /*0000*/                   EXIT ;
"""
LOG = """ptxas info    : Compiling entry function 'k' for 'sm_90'
ptxas info    : Function properties for k
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 54 registers, used 1 barriers, 1056 bytes smem
"""


def listed() -> Kernel:
    kernel, _ = sass.parse(Cubin(Path("a.cu"), 90, Path("a.cubin"), LOG), LISTING)
    return kernel


def test_a_listing_is_parsed() -> None:
    kernel = listed()
    assert (kernel.name, kernel.threads, kernel.registers) == ("k", 256, 54)
    assert (kernel.shared, kernel.spill_bytes, len(kernel.instructions)) == (1056, 16, 18)
    assert kernel.successors == {
        0: [2, sass_cfg.END], 2: [3], 3: [8, 5], 5: [12], 8: [12], 12: [3, 13], 13: [15, 13, 15],
        15: [sass_cfg.END], 17: [17],
    }  # fmt: skip


def test_the_main_path_does_most_of_the_work() -> None:
    kernel = listed()
    loop = [instruction.opcode for instruction in kernel.main_path(MATRIX)]
    assert loop == ["LDG.E.64.CONSTANT", "BRA", *["HMMA.16816.F32.BF16"] * 2, "BRA", "BRA.U"]
    # Not in a loop: the whole kernel, by the longer of two paths with as many stores, once through loops.
    whole = [instruction.opcode for instruction in kernel.main_path(WIDE_STORE)]
    assert whole[:3] == ["MOV", "EXIT", "BSSY"] and whole[-2:] == ["STG.E.128", "EXIT"]
    assert whole.count("LDG.E.U8") == 1 and len(whole) == 14


def test_work_around_the_main_loop_does_not_count() -> None:
    """An inner loop of three, and two more in each iteration of the outer loop."""
    work = Instruction("HMMA.16816.F32", False, ())
    jumps = [Instruction("BRA", True, (label,)) for label in (".inner", ".outer")]
    code = [*[work] * 5, *jumps, Instruction("EXIT", False, ())]
    kernel = Kernel("k", Path(), 90, instructions=code, labels={".outer": 0, ".inner": 2})
    assert [i.name for i in kernel.main_path(MATRIX)] == ["HMMA"] * 3 + ["BRA"]


def test_the_innermost_loop_counts() -> None:
    inner_and_outer = {0: [1], 1: [2], 2: [2, 3], 3: [1, 4], 4: [sass_cfg.END]}
    graph = sass_cfg.Graph(inner_and_outer)
    assert graph.loops == {1: frozenset({1, 2, 3}), 2: frozenset({2})}
    assert graph.innermost([2]) == {frozenset({2})}
    assert graph.innermost([2, 3, 4]) == {frozenset({2}), frozenset({1, 2, 3})}
    assert graph.best_path(graph.loops[1], lambda block: (0, 1)) == [1, 2, 3]
    assert graph.best_path(None, lambda block: (0, 1)) == [0, 1, 2, 3, 4]


def test_a_call_of_a_label_is_a_jump() -> None:
    text = LISTING.replace("@P1 BRA `(.L_x_2)", "@P1 CALL.REL.NOINC `(.L_x_2)")
    kernel, _ = sass.parse(Cubin(Path("a.cu"), 90, Path("a.cubin"), LOG), text)
    assert kernel.successors == listed().successors
    text = LISTING.replace("@P1 BRA `(.L_x_2)", "@P1 CALL.REL.NOINC `($division)")
    kernel, _ = sass.parse(Cubin(Path("a.cu"), 90, Path("a.cubin"), LOG), text)
    assert kernel.successors[3] == [12]


def test_a_path_may_end_in_a_loop() -> None:
    graph = sass_cfg.Graph({0: [1], 1: [2, sass_cfg.END], 2: [1]})
    assert graph.best_path(None, lambda block: (0, 1)) == [0, 1]


def test_resident_warps() -> None:
    def warps(architecture: int, threads: int, registers: int, shared: int = 0) -> int:
        kernel = Kernel("k", Path(), architecture, threads, registers, shared)
        return limits.resident_warps(kernel)

    assert warps(90, 256, 32) == 64
    assert warps(89, 256, 32) == 48
    assert warps(90, 256, 128) == 16
    assert warps(90, 256, 129) == 8  # allocated by 256 registers per warp: 136 per thread
    assert warps(90, 256, 32, 64 << 10) == 24
    assert warps(120, 256, 32, 64 << 10) == 8
    assert warps(90, 1024, 65) == 0


def test_the_table_has_kernels_beside_their_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "RULES", [Rule("k", 0.5, tokens=8)])
    finding = limits.check(listed())
    assert finding.faults[0] == "spills 16 bytes" and finding.per_weight == 6 / 16
    result = compiled.Compiled(compiled.standard("bf16")[3], rows=[compiled.cuda_row(finding)])
    text = report.render([result])
    assert "kernels as compiled for sm90" in text
    assert re.search(r"^k +54 +1,056 +32 +0\.38 +0\.5 +spills 16 bytes$", text, re.MULTILINE)
    assert result.line() == "1 kernels, 1 beyond their limits"


def test_without_a_compiler_the_reason_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name, path=None: None)
    missing = sass.tools()
    assert missing == "nvcc, nvdisasm, c++filt not found"
    result = compiled.standard("bf16")[3].run()
    assert missing in result.line() and missing in report.render([result])


def test_run_selects_architectures(capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["--list", "--only", "^sass"]) == 0
    names = [f"sass-sm{architecture}" for architecture in sass.ARCHITECTURES]
    assert capsys.readouterr().out.split() == names
    assert BY_ARCHITECTURE.keys() == set(sass.ARCHITECTURES)
