"""The house itself: no file too long to read at a sitting, and no two modules that need each other."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGE = ROOT / "peft_kernels"
LONGEST = 400
SOURCES = [
    path
    for folder in ("peft_kernels", "csrc", "bench", "examples", "tools", "tests")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".cpp", ".h", ".inl", ".cu", ".cuh")
]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(name: str) -> Iterator[str]:
    """Modules of the package that a module imports, inside functions too, but not for types alone."""
    path = MODULES[name]
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in for_types or not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = package.split(".")[: len(package.split(".")) - node.level + 1]
        target = ".".join([*base, *(node.module or "").split(".")]).rstrip(".")
        for alias in node.names:
            found = f"{target}.{alias.name}"
            found = found if found in MODULES else target
            yield found
            # A package's own module runs before those inside it. The root, which imports them all, does too;
            # it is what users import.
            parent = found.rpartition(".")[0]
            if parent not in ("", PACKAGE.name) and not name.startswith(parent):
                yield parent


def circle(graph: dict[str, set[str]]) -> list[str]:
    """Some circle of a graph, as the nodes on its way; empty where there is none."""
    done: set[str] = set()

    def visit(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in done:
            return []
        for other in sorted(graph[name]):
            if found := visit(other, [*way, name]):
                return found
        done.add(name)
        return []

    return next((found for name in graph if (found := visit(name, []))), [])


def test_no_two_modules_import_each_other() -> None:
    graph = {name: set(imported(name)) - {name} for name in MODULES}
    assert sum(map(len, graph.values())) > len(graph), "imports were not found"
    assert " -> ".join(circle(graph)) == ""


def test_a_circle_would_be_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_can_be_read_at_a_sitting(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST, f"{lines} lines, expected at most {LONGEST}"


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


def test_each_family_of_ops_is_in_the_makefiles_list_of_kernels() -> None:
    """By it they run in Triton's interpreter, as PTX for other cards, and under sanitizers."""
    if not (makefile := ROOT / "Makefile").exists():
        pytest.skip("no Makefile here")
    found = re.search(r"^KERNELS := ((?:.*\\\n)*.*)", makefile.read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    listed = set(found[1].replace("\\\n", " ").split())
    families = {
        path.stem
        for path in (PACKAGE / "ops").rglob("*.py")
        if re.search(r"^class \w+\(Op\):", path.read_text(encoding="utf-8"), re.MULTILINE)
    }
    assert len(families) > 12
    assert families - listed == {"multi_lora"} and "lora_multi" in listed
    assert [name for name in listed if not list((ROOT / "tests").rglob(f"test_{name}.py"))] == []
