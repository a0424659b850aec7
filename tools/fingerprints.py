"""Print the table of `peft_kernels/patch/rules/sources.py` for other versions, without installing them.

    python tools/fingerprints.py peft==0.20.0 peft==0.22.0      # pip downloads them
    python tools/fingerprints.py peft-0.22.0-py3-none-any.whl   # or source distributions

A line that the table lacks ends in "# new". Before it goes in, read what has changed, and see that our fused
forward still computes the same, for PEFT also by `tools/peft_tests.py --peft VERSION`.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from peft_kernels.patch.rules.sources import KNOWN, fingerprint_of

Read = Callable[[str], "str | None"]
Table = dict[str, dict[str, list[str]]]
"""Qualified name -> fingerprint -> versions, in the order given."""

ABSENT = "absent"


def main(archives: list[str]) -> int:
    if not archives or archives[0].startswith("-"):
        print(__doc__)
        return 2
    table: Table = {}
    with tempfile.TemporaryDirectory() as folder:
        for archive in archives:
            path = Path(archive) if Path(archive).is_file() else download(archive, Path(folder))
            package, version, read = opened(path)
            add(table, package, version, read)
    print("\n".join(lines(table)))
    return 0


def download(requirement: str, folder: Path) -> Path:
    """The wheel of `name==version`."""
    name, _, version = requirement.partition("==")
    if not re.fullmatch(r"[\w.-]+==[\w.-]+", requirement):
        raise SystemExit(f"{requirement}: expected a wheel, a source distribution or NAME==VERSION")
    command = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
    if subprocess.run([*command, "-d", str(folder), requirement], check=False).returncode:
        raise SystemExit(f"pip download {requirement}: failed, see above")
    (found,) = folder.glob(f"{name}-{version}[-.]*")
    return found


def opened(path: Path) -> tuple[str, str, Read]:
    """Package, version, and how to read one of its files, of a wheel or source distribution."""
    match = re.match(r"(\w+)-([\w.]+?)(-.*\.whl|\.tar\.gz)$", path.name)
    if match is None:
        raise SystemExit(f"{path}: expected the name of a wheel or of a source distribution (.tar.gz)")
    package, version, kind = match.groups()
    texts: dict[str, str] = {}
    wanted = {file for name in KNOWN for file in files(name)}
    if kind == ".tar.gz":
        with tarfile.open(path) as tar:
            for member in tar:
                inside = re.sub(r"^[^/]+/(src/)?", "", member.name)
                if inside in wanted and (file := tar.extractfile(member)) is not None:
                    texts[inside] = file.read().decode()
    else:
        with zipfile.ZipFile(path) as wheel:
            texts = {name: wheel.read(name).decode() for name in wheel.namelist() if name in wanted}
    return package, version, texts.get


def files(name: str) -> list[str]:
    """Where a function of this qualified name may be written, the longest path first."""
    parts = name.split(".")
    return ["/".join(parts[:end]) + ".py" for end in range(len(parts) - 1, 0, -1)]


def add(table: Table, package: str, version: str, read: Read) -> None:
    """All functions that are known of this package, as they are in this version."""
    for name in KNOWN:
        if name.partition(".")[0] == package:
            found = fingerprint_in(name, read) or ABSENT
            table.setdefault(name, {}).setdefault(found, []).append(version)


def fingerprint_in(name: str, read: Read) -> str | None:
    """The fingerprint of the function of this qualified name, or None when there is none."""
    for file in files(name):
        text = read(file)
        if text is not None:
            node = find(ast.parse(text).body, name.split(".")[file.count("/") + 1 :])
            return None if node is None else fingerprint_of(node)
    return None


def find(body: Iterable[ast.stmt], path: list[str]) -> ast.stmt | None:
    """The last definition of a class's method, or a function, at any depth of `if` and `try`."""
    found = None
    for node in body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            if node.name == path[0]:
                found = find(node.body, path[1:]) if path[1:] else node
        else:
            for block in ("body", "orelse", "handlers", "finalbody"):
                found = find(getattr(node, block, []), path) or found
    return found


def lines(table: Table) -> list[str]:
    """The table as it is written in Python."""
    result = []
    for name, entries in table.items():
        result.append(f'    "{name}": {{')
        for found, versions in entries.items():
            span = versions[0] if len(versions) == 1 else f"{versions[0]} to {versions[-1]}"
            if found == ABSENT:
                result.append(f"        # absent in {', '.join(versions)}")
            else:
                new = "" if found in KNOWN[name] else "  # new"
                result.append(f'        "{found}": "{span}",{new}')
        result.append("    },")
    return result


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
