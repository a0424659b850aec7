"""Runs PEFT's own tests twice, unchanged and with every LoRA model patched, and compares test by test.

Exits with 1 if a test passes stock and fails patched. Nothing is fetched from the hub: small models are made
(`peft_tests_models.py`), and tests that need more fail in both runs. Tests come from the source distribution
of the PEFT under test: the installed one, or others that pip installs into a folder, without changing the
environment.

    python tools/peft_tests.py                          # all files that test LoRA without the hub
    python tools/peft_tests.py test_mixed.py -k forward --sdist peft-0.21.2.tar.gz
    python tools/peft_tests.py --peft oldest --peft newest
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import upstream_tests
import versions

MODEL_FILES = (
    "test_decoder_models.py",
    "test_encoder_decoder_models.py",
    "test_seq_classifier.py",
    "test_feature_extraction_models.py",
)
FILES = (
    "test_custom_models.py",
    "test_initialization.py",
    "test_tuners_utils.py",
    "test_low_level_api.py",
    "test_mixed.py",
    "test_other.py",
    "test_lora_variants.py",
    "test_lora_conversion.py",
    "test_lora_ga.py",
    "test_lorafa.py",
    "test_loraplus.py",
    "test_bdlora.py",
    "test_velora.py",
    "test_riemannian_lora.py",
    "test_helpers.py",
    "test_hub_features.py",
    "test_mapping.py",
    "test_trainable_tokens.py",
    "test_target_parameters.py",
    *MODEL_FILES,
)
"""Files with LoRA tests whose models need no download, or are made by `peft_tests_models.py`."""

OTHER_TUNERS = ("adamss", "delora", "glora", "gralora", "randlora", "tinylora", "unilora", "vblora")
_NO_OTHERS = "".join(f" and not {name}" for name in OTHER_TUNERS)
SLICES = {
    "test_custom_models.py": "(lora or MultipleActive or RequiresGrad or MultiRank or DynamicDispatch)"
    + _NO_OTHERS,
    **dict.fromkeys(MODEL_FILES, "lora" + _NO_OTHERS),
}
"""Expressions for -k that select the LoRA tests of a file: most others, 19,000 in the first, are of other
tuners."""

INTERNAL = {"test_target_parameter_result_caching_works": "it counts calls of _LoraFactorsProxy"}
"""Tests of internals of PEFT's forward, and why a fused one fails them."""

NEEDED = {"parameterized": "parameterized", "diffusers": "diffusers", "scipy": "scipy"}
NEEDED |= {"attr": "attrs", "importlib_metadata": "importlib_metadata", "zipp": "zipp"}
"""Imports of the test modules beyond PEFT's and TRL's requirements: module and package name."""

OLDEST, NEWEST = "oldest", "newest"
CONFTEST = '''"""Written by peft_tests.py. Tests that need the hub fail at once, without retries."""

import contextlib
import types

import pytest

from . import testing_utils

testing_utils.hub_online_once = lambda model_id: contextlib.nullcontext()


@pytest.fixture(autouse=True)
def tolerance_of_windows(request, monkeypatch):
    """Llama4's logits of 24 are compared to 1e-6, below one rounding of them; on Windows PEFT allows 1e-5."""
    if request.node.name.startswith("test_disable_adapter[trl-internal-testing/tiny-Llama4"):
        from . import testing_common

        monkeypatch.setattr(testing_common, "platform", types.SimpleNamespace(system=lambda: "Windows"))
'''

INI = """[pytest]
markers =
    single_gpu_tests
    multi_gpu_tests
    regression
    bitsandbytes
"""


@dataclass
class Record:
    """One test in one run."""

    outcome: str
    message: str
    layers: int
    calls: Counter[str]
    fallbacks: Counter[str]


Run = dict[str, Record]


def main() -> int:
    options = arguments()
    status = 0
    with scratch(options.cache) as cache:
        packages = missing_packages(cache / "packages")
        for wanted in options.peft or [None]:
            version = importlib.metadata.version("peft") if wanted is None else resolve(wanted)
            folder = cache / version
            path = [packages] if wanted is None else [installed(version, folder / "peft"), packages]
            status |= test(options, version, folder, path)
    return status


def test(options: argparse.Namespace, version: str, folder: Path, path: list[Path]) -> int:
    """Runs the tests of this version of PEFT, found on `path` or installed. Returns the exit status."""
    sdist = options.sdist or download(version, folder / "sdist")
    unpack(sdist, version, folder / "work")
    print(f"== peft {version}", flush=True)
    slices: dict[str | None, list[str]] = {}
    for name in options.files or FILES:
        if not (folder / "work" / "tests" / name).exists():
            if name in options.files:
                raise SystemExit(f"{name}: expected a file in tests/ of {sdist}, found none")
            print(f"{name}: not in peft {version}")
            continue
        chosen = options.k if options.k is not None else SLICES.get(name) if not options.files else None
        slices.setdefault(chosen, []).append(name)
    runs: dict[str, Run] = {}
    for mode in ("stock", "patched"):
        records = folder / f"records-{mode}"
        shutil.rmtree(records, ignore_errors=True)
        records.mkdir(parents=True)
        for keyword, names in slices.items():
            print(f"== {mode}: {' '.join(names)}" + (f" -k '{keyword}'" if keyword else ""), flush=True)
            upstream_tests.run_pytest(
                "peft_tests_plugin",
                mode,
                names,
                keyword,
                folder / "work",
                records,
                options.n,
                ["--continue-on-collection-errors"],
                path,
                PEFT_TESTS_VERSION=version,
                HF_DATASETS_OFFLINE="1",
            )
        runs[mode] = read(records)
    return compare(runs["stock"], runs["patched"])


def arguments() -> argparse.Namespace:
    parser = upstream_tests.parser(__doc__)
    parser.add_argument("files", nargs="*", metavar="test_FILE.py", help="files of PEFT's tests/")
    parser.add_argument("-k", help="pytest's -k, for all files")
    parser.add_argument(
        "--peft",
        action="append",
        metavar="VERSION",
        help=f"test this PEFT, or the {OLDEST} or {NEWEST}, not the installed one; may be repeated",
    )
    parser.add_argument("--sdist", type=Path, help="PEFT's source distribution; else pip downloads it")
    parser.add_argument(
        "--cache", type=Path, help="folder that keeps downloads and records (default: temporary)"
    )
    options = parser.parse_args()
    if options.sdist is not None and not options.sdist.is_file():
        parser.error(f"--sdist: expected a file, got {options.sdist}")
    for version in options.peft or []:
        if version not in (OLDEST, NEWEST) and not re.fullmatch(r"\d+\.\d+[.\w]*", version):
            parser.error(f"--peft: expected a version, {OLDEST} or {NEWEST}, got {version}")
    if options.sdist is not None and len(options.peft or []) > 1:
        parser.error("--sdist: expected one --peft at most, as it is of one version")
    return options


class scratch:
    """The cache folder, or a temporary one that is deleted afterwards."""

    def __init__(self, cache: Path | None) -> None:
        self.temporary = tempfile.TemporaryDirectory(prefix="peft_tests_") if cache is None else None
        self.folder = Path(self.temporary.name) if self.temporary else Path(str(cache)).resolve()

    def __enter__(self) -> Path:
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder

    def __exit__(self, *_: object) -> None:
        if self.temporary is not None:
            self.temporary.cleanup()


def resolve(wanted: str) -> str:
    """The version number; the newest is that of the package index."""
    if wanted not in (OLDEST, NEWEST):
        return wanted
    peft = "peft" if wanted == NEWEST else f"peft=={versions.oldest()['peft']}"
    with tempfile.TemporaryDirectory() as folder:
        pip("download", peft, "--no-deps", "--only-binary", "peft", "-d", folder)
        return next(Path(folder).iterdir()).name.split("-")[1]


def installed(version: str, folder: Path) -> Path:
    """A folder for PYTHONPATH with this PEFT."""
    if not (folder / f"peft-{version}.dist-info").exists():
        print(f"installing into {folder}: peft {version}", flush=True)
        pip("install", "--upgrade", "--no-deps", "--target", str(folder), f"peft=={version}")
    return folder


def download(version: str, folder: Path) -> Path:
    """PEFT's sdist from the package index, or from the folder."""
    found = folder / f"peft-{version}.tar.gz"
    if not found.exists():
        print(f"downloading the source distribution of peft {version}", flush=True)
        pip("download", f"peft=={version}", "--no-binary", "peft", "--no-deps", "-d", str(folder))
    if not found.exists():
        raise SystemExit(f"pip download: expected {found}, got {[p.name for p in folder.iterdir()]}")
    return found


def unpack(sdist: Path, version: str, folder: Path) -> None:
    """Unpacks tests/ of the sdist and adds __init__.py and conftest.py, which sdists leave out."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    prefix = f"peft-{version}/tests/"
    with tarfile.open(sdist) as archive:
        members = [member for member in archive.getmembers() if member.name.startswith(prefix)]
        if not members:
            raise SystemExit(f"{sdist}: expected {prefix} in it, as peft {version} is installed; found none")
        for member in members:
            member.name = member.name.partition("/")[2]
        archive.extractall(folder, members, filter="data")
    (folder / "tests" / "__init__.py").touch()
    (folder / "tests" / "conftest.py").write_text(CONFTEST)
    (folder / "pytest.ini").write_text(INI)


def missing_packages(folder: Path) -> Path:
    """A folder for PYTHONPATH with packages that the tests import and the environment lacks."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [
        package
        for module, package in NEEDED.items()
        if importlib.util.find_spec(module) is None
        and not (folder / module).exists()
        and not (folder / f"{module}.py").exists()
    ]
    if missing:
        print(f"installing into {folder}: {', '.join(missing)}", flush=True)
        pip("install", "--upgrade", "--no-deps", "--target", str(folder), *missing)
    return folder


def pip(command: str, *arguments: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", command, "-q", "--disable-pip-version-check", *arguments], check=False
    )
    if done.returncode:
        raise SystemExit(f"pip {command} {' '.join(arguments)}: failed, see above")


def read(folder: Path) -> Run:
    return {
        entry["id"]: Record(
            entry["outcome"],
            entry["message"],
            entry["layers"],
            Counter(entry["calls"]),
            Counter(entry["fallbacks"]),
        )
        for entry in upstream_tests.read(folder)
    }


def compare(stock: Run, patched: Run) -> int:
    """Prints how the runs differ. Returns the exit status."""
    print("\n== tests, stock and patched")
    touching = {name for name in stock.keys() | patched.keys() if layers(stock, name) + layers(patched, name)}
    for title, names in (("all", stock.keys() | patched.keys()), ("that make LoRA layers", touching)):
        for mode, run in (("stock", stock), ("patched", patched)):
            outcomes = Counter(run[name].outcome for name in names if name in run)
            shown = ", ".join(f"{outcomes[key]} {key}" for key in sorted(outcomes))
            print(f"{title:<22} {mode:<12} {shown or 'none'}")

    print("\n== calls of LoRA layers in the patched run")
    calls: Counter[str] = Counter()
    fallbacks: Counter[str] = Counter()
    tests: Counter[str] = Counter()
    for record in patched.values():
        calls.update(record.calls)
        fallbacks.update(record.fallbacks)
        tests.update(record.fallbacks.keys() | {key for key in record.calls if key.startswith("never: ")})
    fused = calls["patched"] - fallbacks.total()
    by_test = [record.calls["patched"] > record.fallbacks.total() for record in patched.values()]
    print(f"{fused:>8} fused, in {sum(by_test)} tests")
    print(f"{calls['base']:>8} adapters disabled or merged: base layer only")
    for reason, count in fallbacks.most_common():
        print(f"{count:>8} original forward, in {tests[reason]} tests: {reason}")
    for key, count in calls.most_common():
        if key.startswith("never: "):
            print(f"{count:>8} layer not patched, in {tests[key]} tests: {key.removeprefix('never: ')}")

    broken = sorted(name for name in stock if passed(stock, name) and not passed(patched, name))
    internal = {name: why for name in broken for test, why in INTERNAL.items() if f"::{test}" in name}
    broken = [name for name in broken if name not in internal]
    for name, why in internal.items():
        print(f"fails patched, as expected: {name}: {why}")
    repaired = sorted(
        name for name in patched if patched[name].outcome == "passed" and not passed(stock, name)
    )
    for title, names, run in (
        ("pass stock, fail patched", broken, patched),
        ("fail stock, pass patched", repaired, stock),
    ):
        upstream_tests.show(title, names, {name: record.message for name, record in run.items()})
    if fused <= 0:
        print("\nno call was fused: these tests say nothing about the patch")
    return 1 if broken or fused <= 0 else 0


def layers(run: Run, name: str) -> int:
    return run[name].layers if name in run else 0


def passed(run: Run, name: str) -> bool:
    return name in run and run[name].outcome == "passed"


if __name__ == "__main__":
    sys.exit(main())
