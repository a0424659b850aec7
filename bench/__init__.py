"""Benchmarks. Results are checked by the tests' `testing`; some also use their stub device and processes."""

import sys
from pathlib import Path

_TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path += [str(folder) for folder in (_TESTS, _TESTS / "gpu", _TESTS / "dist")]
