"""Versions of installed libraries, where what a test expects depends on them."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version


def before(library: str, number: str) -> bool:
    """Whether an older version than this is installed."""
    try:
        return Version(version(library)) < Version(number)
    except PackageNotFoundError:
        return False
