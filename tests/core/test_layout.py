"""The layout of the source tree: imports between folders go one way, and files and folders stay small."""

from __future__ import annotations

import ast
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE = ROOT / "peft_kernels"
MOST_LINES, MOST_FILES, MOST_BRANCHES = 400, 25, 20
SOURCES = [
    path
    for folder in ("peft_kernels", "csrc", "bench", "examples", "tools", "tests")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".cpp", ".h", ".inl", ".cu", ".cuh")
]
LAYERS = {
    "peft_kernels": (
        "core",
        "ops",
        "triton_kernels",
        "nf4",
        "nn",
        "quantize",
        "host_memory",
        "prompts",
        "optim",
        "patch",
        "prefix",
        "checkpoints",
        "adapters",
        "integrations",
        "serving",
        "cli",
    ),
    "bench": ("lib", "ops", "models", "gpu", "run"),
}
"""Folders and modules of a package, each of which imports only those before it."""
BUDGETS = {
    "bench": 8_190,
    "csrc/common": 1_600,
    "csrc/cpu": 12_000,
    "csrc/cuda": 14_350,  # scale codes: MXFP4 and NVFP4 read packed for few rows, an eighth of the bytes
    "examples": 2_400,
    "peft_kernels": 700,
    "peft_kernels/adapters": 1_600,
    "peft_kernels/checkpoints": 3_900,
    "peft_kernels/cli": 1_900,
    "peft_kernels/core": 3_700,
    "peft_kernels/integrations": 2_400,
    "peft_kernels/nf4": 5_600,
    "peft_kernels/ops": 4_220,  # a gradient of the entropy, dropout of attention weights, distillation
    "peft_kernels/optim": 1_900,
    "peft_kernels/patch": 6_045,  # forwards of any version are recognised; losses by hand keep logits lazy
    "peft_kernels/prefix": 200,
    "peft_kernels/quantize": 2_000,
    "peft_kernels/serving": 1_700,
    "peft_kernels/triton_kernels": 5_850,
    "tests": 79_625,
    "tools": 3_200,
}
"""Most lines of code in a folder and those below it. A commit that adds a feature removes as many lines, or
raises the number and says what they buy; one that removes lines lowers it."""


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for package in LAYERS for path in sorted((ROOT / package).rglob("*.py"))}


def imported(name: str) -> Iterator[str]:
    """Modules of the project that a module imports, inside functions and for types too."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                found = f"{base}.{alias.name}"
                if found in MODULES or base in MODULES:
                    yield found if found in MODULES else base


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Nodes along some circle of a graph; empty where there is none."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for other in sorted(graph.get(name, ())):
            if found := visit(other, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in graph if (found := visit(name, []))), [])


def test_no_two_modules_import_each_other() -> None:
    """The package's root is left out: it imports all the others for its users, and has the version."""
    graph = {name: set(imported(name)) - {name, *LAYERS} for name in MODULES}
    assert sum(map(len, graph.values())) > len(graph), "imports were not found"
    assert " -> ".join(circle(graph)) == ""


def test_a_circle_would_be_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize("package", LAYERS)
def test_imports_between_folders_go_one_way(package: str) -> None:
    layers = LAYERS[package]
    found = {name.split(".")[1] for name in MODULES if name.startswith(f"{package}.")} - {"__main__"}
    assert found == set(layers), "a new folder or module needs a place in LAYERS"
    upward = []
    for name in MODULES:
        folder = name.split(".")[1] if name.startswith(f"{package}.") else ""
        for other in imported(name) if folder in layers else ():
            top = other.split(".")[1] if other.startswith(f"{package}.") else ""
            if top in layers and layers.index(top) > layers.index(folder):
                upward.append(f"{name} imports {other}")
    assert upward == []


@pytest.mark.parametrize("back_end", ["cpu", "cuda"])
def test_includes_between_folders_of_kernels_go_one_way(back_end: str) -> None:
    """A family's kernels may use another's, as LoRA uses linear, but not each the other's."""
    tree = ROOT / "csrc" / back_end
    graph: dict[str, set[str]] = defaultdict(set)
    for path in sorted(tree.rglob("*.*")):
        for name in re.findall(r'^#\s*include "([^"]+)"', path.read_text(encoding="utf-8"), re.MULTILINE):
            other = (path.parent / name).resolve()
            if tree in other.parents:
                graph[path.relative_to(tree).parts[0]].add(other.relative_to(tree).parts[0])
    graph = {folder: others - {folder} for folder, others in graph.items()}
    assert sum(map(len, graph.values())) > len(graph), "includes were not found"
    assert " -> ".join(circle(graph)) == ""


def test_a_file_has_at_most_400_lines() -> None:
    counts = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    assert len(counts) > 900
    assert {path.name: lines for path, lines in counts.items() if lines > MOST_LINES} == {}


def test_folders_keep_to_their_budgets() -> None:
    counts: Counter[str] = Counter()
    for path in SOURCES:
        parts = path.relative_to(ROOT).parts
        folder = "/".join(parts[:2]) if parts[0] in ("peft_kernels", "csrc") and len(parts) > 2 else parts[0]
        counts[folder] += len(path.read_text(encoding="utf-8").splitlines())
    assert counts.keys() == BUDGETS.keys()
    assert {folder: lines for folder, lines in counts.items() if lines > BUDGETS[folder]} == {}


def test_a_folder_has_at_most_25_files() -> None:
    counts = Counter(path.parent.relative_to(ROOT).as_posix() for path in SOURCES)
    assert len(counts) > 40
    assert {folder: count for folder, count in counts.items() if count > MOST_FILES} == {}


_BRANCHES = (ast.If, ast.IfExp, ast.For, ast.While, ast.With, ast.ExceptHandler, ast.Assert, ast.match_case)


def branches(function: ast.AST) -> int:
    """1, and one for each branch, loop and further condition. Functions inside are counted by themselves."""
    count, nodes = 1, list(ast.iter_child_nodes(function))
    for node in nodes:
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            nodes += ast.iter_child_nodes(node)
        count += isinstance(node, _BRANCHES)
        count += len(node.values) - 1 if isinstance(node, ast.BoolOp) else 0
        count += 1 + len(node.ifs) if isinstance(node, ast.comprehension) else 0
    return count


def test_a_function_has_at_most_20_branches() -> None:
    found = {
        f"{name}:{node.lineno} {node.name}": branches(node)
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and name.startswith("peft_kernels")
    }
    assert len(found) > 2000
    assert {name: count for name, count in found.items() if count > MOST_BRANCHES} == {}


def test_names_of_test_modules_are_unique() -> None:
    """Tests import what they share by the name alone (conftest.py)."""
    names = Counter(path.stem for path in SOURCES if "tests" in path.parts and path.suffix == ".py")
    assert {name for name, count in names.items() if count > 1} <= {"conftest"}


def test_names_in_headers_of_cpu_kernels_are_one_things() -> None:
    """Two types or constants of one name in two headers are one to the linker, which takes either. Headers of
    levels (vec_, tiles_) are each in a namespace of their own."""
    homes: dict[str, set[str]] = {}
    for path in sorted((ROOT / "csrc" / "cpu").rglob("*.h")):
        if path.name.startswith(("vec_", "tiles_")):
            continue
        text = path.read_text(encoding="utf-8")
        names = re.findall(r"^(?:struct|class|enum class) (\w+)[^;\n]*\{", text, re.MULTILINE)
        for constants in re.findall(r"^inline constexpr [\w:]+ ([^;]+);", text, re.MULTILINE):
            names += re.findall(r"\b(k\w+) =", constants)
        for name in names:
            homes.setdefault(name, set()).add(path.name)
    assert len(homes) > 50
    assert {name: found for name, found in homes.items() if len(found) > 1} == {}


def test_each_family_of_ops_has_a_folder_of_tests() -> None:
    """The Makefile runs those folders in Triton's interpreter, as PTX for other cards, and under
    sanitizers."""
    ops = PACKAGE / "ops"
    families = {
        path.relative_to(ops).parts[0].removesuffix(".py")
        for path in ops.rglob("*.py")
        if re.search(r"^class \w+\(Op\):", path.read_text(encoding="utf-8"), re.MULTILINE)
    } - {"casts", "sums"}  # of the families' helpers: tests/ops/core
    assert len(families) == 9
    assert families - {path.name for path in (ROOT / "tests" / "ops").iterdir()} == set()
