"""Packs a binary wheel, the same bytes from the same files, and checks its libraries.

A library runs on every Linux of manylinux_2_28 if it needs no newer symbols, and on every Python if it needs
none of Python's.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import subprocess
import time
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}
"""The newest versions of symbols in manylinux_2_28."""
SYSTEM = ("libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "libpthread.so.0")
LOADERS = ("ld-linux-x86-64.so.2", "ld-linux-aarch64.so.1")
OPENMP = ("GOMP_", "omp_")
"""Prefixes of OpenMP's functions: those of the runtime that torch loads. Naming one could load a second."""
EARLIEST = 315532800
"""1980, before which an archive has no dates."""


def readelf(library: Path, *options: str) -> str:
    return subprocess.run(
        ["readelf", "-W", *options, str(library)],
        capture_output=True, text=True, check=True, env=os.environ | {"LC_ALL": "C"},
    ).stdout  # fmt: skip


def exported(library: Path) -> set[str]:
    """The names of the symbols that a library defines, without versions."""
    return {name.partition("@")[0] for section, _, name in symbols(library) if section != "UND"}


def symbols(library: Path) -> Iterator[tuple[str, str, str]]:
    """The section (UND: undefined), binding and name@version of each dynamic symbol."""
    for line in readelf(library, "--dyn-syms").splitlines():
        words = line.split()
        if len(words) >= 8 and words[0].rstrip(":").isdigit():
            yield words[6], words[4], words[7]


def too_new(version: str) -> bool:
    """Whether a version of symbols (GLIBC_2.34) is not in manylinux_2_28."""
    name, _, numbers = version.rpartition("_")
    if name not in NEWEST or not re.fullmatch(r"[\d.]+", numbers):
        return True
    return tuple(map(int, numbers.split("."))) > NEWEST[name]


def problems(library: Path, beside: Iterable[str], provided: set[str], paths: Iterable[Path]) -> list[str]:
    """Sentences on what keeps a library from running elsewhere, or its bytes from being the same elsewhere.

    `beside`: names of the libraries that it may need beside the system's; they export `provided`. `paths`:
    folders of this machine.
    """
    found = []
    names = [
        (binding, *name.partition("@")[::2])
        for section, binding, name in symbols(library)
        if section == "UND"
    ]
    of_version: dict[str, list[str]] = {}
    for _, name, version in names:
        of_version.setdefault(version.strip("@"), []).append(name)
    # A library beside may name its versions after itself.
    allowed = {*beside, *SYSTEM, *LOADERS}
    versions = {*re.findall(r"Name: (\w+_[\w.]+)", readelf(library, "-V"))} | {*of_version} - {""}
    for version in sorted(versions - allowed):
        if too_new(version):
            found.append(
                f"needs {version}, newer than manylinux_2_28: {', '.join(of_version.get(version, ['?']))}"
            )
    for needed in re.findall(r"\(NEEDED\).*\[(.+)\]", readelf(library, "-d")):
        if needed not in allowed:
            found.append(f"needs the library {needed}")
    for binding, name, version in names:
        if not version and binding == "GLOBAL" and name not in provided and not name.startswith(OPENMP):
            found.append(f"needs {name}, which no library exports")
    content = library.read_bytes()
    found += [f"contains the path {path}" for path in paths if f"{path}/".encode() in content]
    return [f"{library.name} {problem}" for problem in found]


def packed(pure: Path, libraries: Mapping[str, Path], tag: str, folder: Path) -> Path:
    """A wheel in `folder` with the files of a pure one and libraries, by their names in the package."""
    files = {}
    with zipfile.ZipFile(pure) as archive:
        for name in archive.namelist():
            if not name.endswith(("/", ".dist-info/RECORD")):
                files[name] = archive.read(name)
    (info,) = {name.partition("/")[0] for name in files if ".dist-info/" in name}
    package = info.partition("-")[0]
    files |= {f"{package}/{name}": library.read_bytes() for name, library in libraries.items()}
    said = files[f"{info}/WHEEL"].decode()
    said = re.sub(r"^Root-Is-Purelib: .*$", "Root-Is-Purelib: false", said, flags=re.M)
    files[f"{info}/WHEEL"] = re.sub(r"^Tag: .*$", f"Tag: {tag}", said, flags=re.M).encode()
    lines = [f"{name},sha256={digest(files[name])},{len(files[name])}" for name in sorted(files)]
    files[f"{info}/RECORD"] = "\n".join([*lines, f"{info}/RECORD,,", ""]).encode()
    date = time.gmtime(max(int(os.environ.get("SOURCE_DATE_EPOCH", EARLIEST)), EARLIEST))[:6]
    wheel = folder / f"{info.removesuffix('.dist-info')}-{tag}.whl"
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name in sorted(files, key=lambda name: (name.startswith(f"{info}/"), name)):
            entry = zipfile.ZipInfo(name, date)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.create_system = 3  # Unix, whose permissions follow
            entry.external_attr = (0o100755 if name.endswith(".so") else 0o100644) << 16
            archive.writestr(entry, files[name])
    return wheel


def digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
