"""Benchmarks. Results are checked by the tests' `testing`; some cases use their stub device."""

import sys
from pathlib import Path

_TESTS = Path(__file__).resolve().parent.parent / "tests"
sys.path += [str(folder) for folder in (_TESTS, _TESTS / "gpu")]
